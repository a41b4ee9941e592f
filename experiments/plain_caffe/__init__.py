"""Plain Caffe as a judge of weights, and as the maker of networks that need rescaling."""
