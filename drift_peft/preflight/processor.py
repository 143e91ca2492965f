"""What the processor of a base says of the size and number of images, where the recipe's processor_kwargs do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..checkpoints import folder_of, read_json
from ..warn import warn
from .memory import COUNTED, Settings

NESTED, ALONE = "processor_config.json", "preprocessor_config.json"  # as transformers looks for it, in this order
READ = {*COUNTED, "size", "do_image_splitting", "use_thumbnail", "crop_to_patches", "do_pan_and_scan"}
# Families whose processor decides itself, whatever its file says of its image processor -> what it decides.
DECIDED = {
    "internvl": {"crop_to_patches"},
    "aya_vision": {"crop_to_patches"},
    "qianfan_ocr": {"crop_to_patches"},
    "got_ocr2": {"crop_to_patches", "max_patches"},
    "gemma3": {"do_pan_and_scan", "pan_and_scan_max_num_crops"},
}


def with_processor(settings: Settings, family: str) -> Settings:
    """The settings, with those of the base's own processor beside the recipe's processor_kwargs, which win as they do
    in `from_pretrained`; the same where the base has no such file.

    Raises:
        ValueError: the file cannot be read.

    Warns:
        UserWarning: the processor leaves images as large as they are; or the hub does not give it now.
    """
    try:
        folder = folder_of(settings.base, None, ("config.json", NESTED, ALONE))
    except OSError:  # without a network, where its config.json alone was fetched before
        warn(
            f"The processor of {settings.base} cannot be fetched: what the recipe leaves out of the size of images is "
            "taken to be as its family has it."
        )
        return settings
    file, own = _image_processor(folder)
    kwargs = settings.processor_kwargs or {}
    if own.get("do_resize") is False and not kwargs.get("do_resize"):
        warn(
            f"The processor of {settings.base} leaves images as large as they are (do_resize: false): if some are "
            "larger than its size says, training takes more than this."
        )
    read = {key: _whole(own[key]) for key in READ - DECIDED.get(family, set()) if own.get(key) is not None}
    try:
        return replace(settings, processor_kwargs={**read, **kwargs}) if read else settings
    except ValueError as error:
        raise ValueError(f"{file} has a setting of images that cannot be used: {error}") from error


def _whole(value: object) -> object:
    """Numbers of pixels as whole numbers, which some files write as 1003520.0."""
    if isinstance(value, dict):
        return {key: _whole(part) for key, part in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _image_processor(folder: Path) -> tuple[Path, dict]:
    """The file of the settings of images, and what it says; nothing where there is none."""
    for name in (NESTED, ALONE):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        inside = content.get("image_processor") if name == NESTED and isinstance(content, dict) else content
        if inside and not isinstance(inside, dict):
            raise ValueError(f"{folder / name} holds no settings of images: give the file that save_pretrained wrote")
        if inside:
            return folder / name, inside
    return folder, {}
