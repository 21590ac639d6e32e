"""EfficientCLIP: a text tower trained against frozen image features, on packed tokens, with noisy pairs thrown out.

The way of the data is the way of the imports, and none points up: `data`, `model`, `prepare`, `objectives`, `noise`,
`training`, `evaluation`, `planning`, and `cli` on top; all stand on `errors`, `stopping`, `files` and `config`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.images import ImageLoader
    from .data.pairs import PairLoader
    from .model.efficientclip import EfficientCLIP

__version__ = "0.1.0"
__all__ = ["EfficientCLIP", "ImageLoader", "PairLoader"]


def __getattr__(name: str) -> Any:
    # `efficientclip --help` shall not wait for torch.
    if name == "ImageLoader":
        from .data.images import ImageLoader

        return ImageLoader
    if name == "PairLoader":
        from .data.pairs import PairLoader

        return PairLoader
    if name == "EfficientCLIP":
        from .model.efficientclip import EfficientCLIP

        return EfficientCLIP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
