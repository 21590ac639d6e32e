"""Real photographs that packages carry, each with a Chinese query that names it: no training sees either."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .packages import WALLPAPERS, unpack
from .pictures import write_tar

SKIMAGE, SKLEARN, LOMIRI = "skimage/data", "sklearn/datasets/images", "usr/share/backgrounds"
WHEELS = {SKIMAGE: "scikit-image", SKLEARN: "scikit-learn"}
NASA, SPACEX = "NASA, public domain", "SpaceX, public domain"
AITZOL, FREESPACE = "Aitzol Berasategi, CC-BY-4.0", "Trevor “Freespace”, CC-BY-4.0"
STEFAN, NERLICH = "Stefan van der Walt, CC0", "Peter Nerlich, CC-BY-SA-4.0"


@dataclass(frozen=True)
class Photograph:
    """`folder` of a package holds `file`; `credit` is photographer and licence."""

    folder: str
    file: str
    query: str
    credit: str

    @property
    def key(self) -> str:
        return self.file.partition(".")[0].lower()


# All in which a layman sees one thing, and whose licence is told.
PHOTOGRAPHS = (
    Photograph(SKIMAGE, "astronaut.png", "穿橙色太空服微笑的女宇航员", NASA),
    Photograph(SKIMAGE, "brick.png", "用砖砌成的墙", "CC0Textures, CC0"),
    Photograph(SKIMAGE, "camera.png", "一个男人用三脚架上的相机拍照", "Lav Varshney, CC0"),
    Photograph(SKIMAGE, "chelsea.png", "一只盯着看的小花猫", STEFAN),
    Photograph(SKIMAGE, "coffee.png", "木桌上放着一杯咖啡", "Rachel Michetti, CC0"),
    Photograph(SKIMAGE, "coins.png", "一排排古代的钱币", "Brooklyn Museum, no known restrictions"),
    Photograph(SKIMAGE, "grass.png", "地上长满了草", "linolafett, CC0"),
    Photograph(SKIMAGE, "gravel.png", "许多小石子", "CC0Textures, CC0"),
    Photograph(SKIMAGE, "hubble_deep_field.jpg", "望远镜看到的遥远星系", NASA),
    Photograph(SKIMAGE, "page.png", "印着英文字的一页纸", "the scikit-image team, BSD-3-Clause"),
    Photograph(SKIMAGE, "rocket.jpg", "夜里发射架上的火箭", SPACEX),
    Photograph(SKLEARN, "china.jpg", "湖边的中国古塔", "danielbuechele, CC-BY-2.0"),
    Photograph(SKLEARN, "flower.jpg", "一朵橙黄色的大丽花", "vultilion, CC-BY-2.0"),
    Photograph(LOMIRI, "Picture_0B_by_freespace.jpg", "红碗里切开的无花果", FREESPACE),
    Photograph(LOMIRI, "Picture_1A_by_freespace.jpg", "沾着颜料的几支画笔", FREESPACE),
    Photograph(LOMIRI, "Wine_by_Jakkub_Mede.jpg", "房间里的手鼓", "Jakub Mede, CC-BY-4.0"),
    Photograph(LOMIRI, "aitzgorri_by_Aitzol_Berasategi.jpg", "山下的绿草地和秋天的树林", AITZOL),
    Photograph(LOMIRI, "free_by_Peter_Nerlich.jpg", "张开翅膀飞的鹦鹉", NERLICH),
    Photograph(LOMIRI, "friends_by_Aitzol_Berasategi.jpg", "两条狗从窗户里往外看", AITZOL),
    Photograph(LOMIRI, "greentock_by_Peter_Nerlich.jpg", "一个圆形挂钟的表盘", NERLICH),
    Photograph(LOMIRI, "life_by_Aitzol_Berasategi.jpg", "林中小溪流过石头", AITZOL),
    Photograph(LOMIRI, "picosdeeuropa_by_Aitzol_Berasategi.jpg", "有积雪的高山", AITZOL),
    Photograph(LOMIRI, "seeding_by_Clements_Engelhardt.jpg", "草丛里毛茸茸的蒲公英", "Clemens Engelhardt, CC0"),
    Photograph(LOMIRI, "sunset_by_Aitzol_Berasategi.jpg", "太阳落到山的后面", AITZOL),
)


def write_photographs(tar: Path, cache: Path, packages: dict[str, Path]) -> None:
    """A webdataset tar of the photographs as they are in their packages, each with its query as caption."""
    members = []
    for photograph in sorted(PHOTOGRAPHS, key=lambda one: one.key):
        record = {"captions": [photograph.query], "source": photograph.folder, "credit": photograph.credit}
        members += [
            (f"{photograph.key}{Path(photograph.file).suffix}", _read(photograph, cache, packages)),
            (f"{photograph.key}.json", json.dumps(record, ensure_ascii=False).encode()),
        ]
    write_tar(tar, members)


def credits() -> list[str]:
    """A line for each photographer: what is whose, by which licence."""
    of: dict[str, list[str]] = {}
    for photograph in PHOTOGRAPHS:
        of.setdefault(photograph.credit, []).append(photograph.file)
    return [f"photographs {', '.join(files)}: {credit}" for credit, files in of.items()]


def _read(photograph: Photograph, cache: Path, packages: dict[str, Path]) -> bytes:
    name = f"{photograph.folder}/{photograph.file}"
    package = packages[WHEELS.get(photograph.folder, WALLPAPERS)]
    try:
        if photograph.folder in WHEELS:
            with zipfile.ZipFile(package) as wheel:
                return wheel.read(name)
        return (unpack(cache, package) / name).read_bytes()
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"demo-data: {package} has no whole {name}; delete the file and run again") from error
