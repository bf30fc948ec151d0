"""ALIGN's image encoder (Jia et al., 2021): EfficientNet-B7 without the convolution before its pooling."""

import timm
from timm.models import register_model
from timm.models.efficientnet import EfficientNet
from torch import nn


@register_model
def align_efficientnet_b7(pretrained: bool = False, num_classes: int = 0, **options) -> EfficientNet:
    """EfficientNet-B7 whose features are the last stage's 640 channels, averaged. With Kakao's kind of padding."""
    model = timm.create_model("tf_efficientnet_b7", pretrained=pretrained, **options)
    assert isinstance(model, EfficientNet)
    model.num_features = model.conv_head.in_channels  # pyright: ignore[reportAttributeAccessIssue]
    model.conv_head, model.bn2 = nn.Identity(), nn.Identity()
    model.reset_classifier(num_classes)
    return model
