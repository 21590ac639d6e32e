"""`efficientclip`, whose image tower takes its time and tells when it is at work."""

import sys
import time
from typing import Any

from efficientclip import cli
from efficientclip.model.frozen import FrozenImages

encode_pixels = FrozenImages.encode_pixels


def slowly(self: FrozenImages, pixels: Any) -> Any:
    print("encoding", flush=True)
    time.sleep(0.1)
    return encode_pixels(self, pixels)


FrozenImages.encode_pixels = slowly  # type: ignore[method-assign]
sys.exit(cli.main())
