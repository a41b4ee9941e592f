"""Classification into one of many classes, as on ImageNet (section 4.5): nets, images, curves."""
