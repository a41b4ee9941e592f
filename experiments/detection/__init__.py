"""Object detection with Fast R-CNN (section 4.1): nets, proposals, batches, detections."""
