"""Encoders: images (N, 3, H, W) -> list of feature maps (N, C, H / stride, W / stride), highest resolution first.

Every encoder is built with `output_stride` (of the last feature map) and `norm_layer` (number of channels ->
normalization layer), and has the attributes `output_stride` and `out_channels` (of every feature map).
`forward(x, return_feature_maps=False)` returns all feature maps, or a list with the last one.
"""
