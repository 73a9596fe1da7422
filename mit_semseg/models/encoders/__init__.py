"""Encoders: images (N, 3, H, W) -> list of feature maps (N, C, H / stride, W / stride), highest resolution first.

Constructor arguments: `output_stride` (stride of the last feature map), `norm_layer` (channels -> normalization layer).
Attributes: `output_stride`, `out_channels` (channels of every feature map).
`forward(x, return_feature_maps=False)` returns a list with the last feature map, or with all of them if True.
"""
