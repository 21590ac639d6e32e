"""`efficientclip`, killed over the pair table when all other files of the store stand."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from efficientclip import cli
from efficientclip.files import digests
from efficientclip.prepare import merge


def killed(*given: Any) -> None:
    others = [given[-1].with_name(name) for name in ("features", "tokens", "ids", "origins")]
    while not all((place / digests.NAME).is_file() for place in others):
        time.sleep(0.01)
    Path(given[-1], "pairs.parquet").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


merge._pairs = killed  # type: ignore[assignment]
sys.exit(cli.main())
