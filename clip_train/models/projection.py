"""The step from a tower's features to the joint embedding, under open_clip's names for the choices."""

from torch import nn

from clip_train.errors import ConfigError

PROJECTIONS = ("linear", "mlp", "none")


def make_projection(
    proj: str, width: int, embed_dim: int, setting: str, *, mlp_width: int, mlp_bias: bool, bias: bool = False
) -> nn.Module:
    """A matrix, two of them with GELU in between, or nothing where the tower's features are the embedding.

    Args:
        proj: `linear`, `mlp` or `none`.
        width: of the tower's features.
        setting: where the choice stands in the config, for errors.
        mlp_width, mlp_bias: of the layer before GELU.
        bias: of the last layer.

    Raises:
        ConfigError: there is no such choice, or it is `none` and the widths differ.
    """
    if proj not in PROJECTIONS:
        raise ConfigError(f"{setting}.proj={proj} is none of {', '.join(PROJECTIONS)}")
    if proj == "none":
        if width != embed_dim:
            raise ConfigError(
                f"{setting}.proj=none: the tower's features are {width} wide, and model.embed_dim={embed_dim};"
                f" give model.embed_dim={width}, or take {setting}.proj=linear"
            )
        return nn.Identity()
    if proj == "linear":
        return _linear(width, embed_dim, bias)
    return nn.Sequential(_linear(width, mlp_width, mlp_bias), nn.GELU(), _linear(mlp_width, embed_dim, bias))


def _linear(width: int, out: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(width, out, bias=bias)
    nn.init.normal_(linear.weight, std=width**-0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
