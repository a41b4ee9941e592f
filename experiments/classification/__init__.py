"""Classification on PASCAL VOC (section 4.1): its nets, its images and its scores."""
