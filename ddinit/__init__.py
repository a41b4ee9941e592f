"""Data-dependent initialization of Caffe networks: the method on a caffe.Net."""
