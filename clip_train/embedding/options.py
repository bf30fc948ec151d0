"""What `clip-embed` is asked for."""

from dataclasses import dataclass
from typing import Any

from clip_train.data.captions import CaptionSource
from clip_train.errors import ConfigError

IMAGE, TEXT = "image", "text"
MODALITIES = (IMAGE, TEXT)
_DTYPES = ("float16", "float32")
_PRECISIONS = ("32", "bf16")
OWN_COLUMNS = ("key", "image_path", "caption", "shard", "offset", "size")
# In lower case: what DuckDB numbers files and rows by, and what the search calls these. Columns of these names would
# come before them, and a condition would take other samples than it says.
RESERVED_COLUMNS = ("file_index", "file_row_number", "clip_train_file", "clip_train_row")


@dataclass(frozen=True)
class EmbedOptions:
    """Of which data, which of their sides, and how they are kept.

    Attributes:
        data: a pattern of shards, or a folder of pictures, or of shards.
        output: the folder to write.
        modality: `image`, `text` or both; a sample needs what is asked for.
        image_key, caption_key: as in the `data` group of the configs. In a folder of pictures, captions and JSON lie
            beside them.
        metadata: entries of the samples' JSON that become columns.
        batch_size: samples per forward pass.
        samples_per_part: of a folder of pictures; of shards, each is a part.
        dtype: of the files, `float16` or `float32`.
        precision: to compute in, `32` or `bf16`.
        compile: by torch.compile.

    Raises:
        ConfigError: a value cannot be used.
    """

    data: str
    output: str
    modality: Any
    image_key: str
    caption_key: Any
    metadata: list[str]
    batch_size: int
    samples_per_part: int
    dtype: str
    precision: str
    compile: bool

    def __post_init__(self) -> None:
        if not self._given or any(side not in MODALITIES for side in self._given):
            raise ConfigError(f"modality={self.modality} is none of image, text and [image,text]")
        for key in ("batch_size", "samples_per_part"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)} is not a whole number of at least 1")
        for key, known in (("dtype", _DTYPES), ("precision", _PRECISIONS)):
            if getattr(self, key) not in known:
                raise ConfigError(f"{key}={getattr(self, key)} is none of {', '.join(known)}")
        if taken := [name for name in self.metadata if name in OWN_COLUMNS or not name]:
            raise ConfigError(f"metadata: {taken[0]!r} is a column already; there are {', '.join(OWN_COLUMNS)}")
        if reserved := [name for name in self.metadata if name.lower() in RESERVED_COLUMNS]:
            raise ConfigError(f"metadata: {reserved[0]!r} is a name that conditions on metadata need themselves")
        CaptionSource.parse(self.caption_key)

    @property
    def sides(self) -> tuple[str, ...]:
        """The modalities, in one order."""
        return tuple(side for side in MODALITIES if side in self._given)

    @property
    def _given(self) -> list[Any]:
        return self.modality if isinstance(self.modality, list) else [self.modality]

    @property
    def captions(self) -> CaptionSource:
        """How captions are found in a sample's files."""
        return CaptionSource.parse(self.caption_key)
