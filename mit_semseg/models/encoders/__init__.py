"""Encoders, which compute feature maps (N, C, H / stride, W / stride), largest first, from images (N, 3, H, W).

Images have ImageNet normalization. Encoders whose weights need another one convert the images.

Constructor arguments: `output_stride` (stride of the last feature map) and `norm_layer` (see `layers.NormLayer`).
Attributes: `output_stride` and `out_channels` (number of channels of each feature map); optionally `size_divisor`
(height and width of images must be multiples of it), and `mean` and `std` (the normalization after conversion).
`stage_of(name)` returns the stage of a parameter, from 0 for the stem; it is needed only for TRAIN.lr_decay.
`forward(x, return_feature_maps=False)` returns a list with only the last feature map; True returns all feature maps.
"""
