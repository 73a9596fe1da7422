"""Encoders: images (N, 3, H, W) -> list of feature maps, highest resolution first.

Every encoder has the attributes `out_channels` (of every feature map) and `output_stride` (of the last one).
`forward(x, return_feature_maps=False)` returns all feature maps, or a list with the last one.
"""
