"""Into how many patches a processor cuts images, how many tokens these become, and what their pixels take.

The recipe's processor_kwargs decide it, and what they leave out the base's own processor (processor.py). What neither
says is as the family's processor has it.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from ..warn import warn

# Families whose processor may crop an image into pieces of the tower's size, and a small one of the whole -> whether it
# does if the recipe does not say, and how many at most.
CROPPED = {"internvl": (True, 12), "aya_vision": (True, 12), "cohere2_vision": (True, 12), "qianfan_ocr": (True, 12),
           "llama4": (True, 16), "got_ocr2": (False, 12), "ovis2": (False, 12)}  # fmt: skip
LARGEST = 16384  # tokens of an image: what Qwen's processors let through, where neither recipe nor base says
MASKED = "idefics2", "idefics3", "smolvlm"  # whose processors make a mask of 64 bits for each pixel
# Settings of a processor that change how images look, and not how large they are; and the least of something, since
# what is counted is the most.
LOOKS = "do_(rescale|normalize|convert_rgb)|rescale_factor|image_(mean|std)|resample|min_.*|pan_and_scan_min_.*"


class Cut(NamedTuple):
    """What a processor makes of a sample's images."""

    pieces: int
    patches: int  # of each piece
    unread: list[str]  # settings that were not looked at

    @property
    def all_patches(self) -> int:
        return self.pieces * self.patches


class _Asked:
    """The settings of a processor, which remember those that were asked for. What its size is made of is among them."""

    def __init__(self, kwargs: dict | None):
        self.settings = {}
        for key, value in (kwargs or {}).items():
            inside = value.items() if key == "size" and isinstance(value, dict) else ()
            self.settings |= {f"size.{name}": inner for name, inner in inside} or {key: value}
        self.left = {key for key in self.settings if not re.fullmatch(LOOKS, key)}

    def __call__(self, key: str, default: Any = None) -> Any:
        self.left.discard(key)
        value = self.settings.get(key)
        return default if value is None else value


def cut(config: PretrainedConfig, kwargs: dict | None, images: int, tokens: int) -> Cut:
    """Into how many patches images are cut at most.

    Args:
        config: of the model.
        kwargs: processor_kwargs, of the recipe alone or with what the base's processor says.
        images: of a sample.
        tokens: most that the sample has.
    """
    ask = _Asked(kwargs)
    pieces, patches = _cut(config, ask, images, tokens)
    return Cut(pieces, patches, sorted(ask.left))


def _cut(config: PretrainedConfig, ask: _Asked, images: int, tokens: int) -> tuple[int, int]:
    vision, family = config.vision_config, config.model_type
    if family == "gemma4":
        return images, ask("max_soft_tokens", 280) * vision.pooling_kernel_size**2
    if family == "lfm2_vl":  # tiles, and the whole
        split, most, whole = ask("do_image_splitting", True), ask("max_tiles", 10), ask("use_thumbnail", True)
        tile, patches = ask("tile_size", 512), ask("max_image_tokens", 256) * config.downsample_factor**2
        if not split:
            return images, patches
        return images * (most + bool(whole)), max((tile // vision.patch_size) ** 2, patches)
    merge = getattr(vision, "spatial_merge_size", 1)
    if merge > 1 or not hasattr(vision, "image_size"):  # Qwen: as many as there are pixels, and as tokens allow
        fewest, longest = ask("size.shortest_edge"), ask("size.longest_edge")
        most = tokens * merge**2
        pixels = ask("max_pixels") or (fewest and longest)  # one edge alone is no number of pixels
        patches = pixels // vision.patch_size**2 if pixels else most
        return (images, patches) if images * patches <= most else (1, most)
    side, patch = _side(vision.image_size), _side(vision.patch_size)
    pieces = getattr(vision, "max_num_tiles", 1)
    if grid := getattr(config, "image_grid_pinpoints", None):  # LLaVA-NeXT: tiles, and the whole
        pieces = 1 + max(height * width for height, width in grid) // side**2
    elif family in ("idefics3", "smolvlm"):  # likewise; 4 x 4 of them if the recipe does not say
        split, edge = ask("do_image_splitting", True), math.ceil(ask("size.longest_edge", 4 * side) / side)
        pieces = 1 + edge**2 if split and edge > 1 else 1
    elif family in CROPPED:
        crops, most = CROPPED[family]
        crops, most = ask("crop_to_patches", crops), ask("max_patches", most)
        pieces = 1 + most if crops and most > 1 else 1
    elif family == "gemma3":
        crops, most = ask("do_pan_and_scan", False), ask("pan_and_scan_max_num_crops", 4)
        pieces = 1 + most if crops else 1
    elif family == "idefics2":
        pieces = 5 if ask("do_image_splitting", True) else 1
    if family == "idefics2" or vision.model_type == "pixtral":  # whose tower sees smaller images as they are
        ask("size.shortest_edge")
        side = min(side, ask("size.longest_edge", side))
    return images * pieces, (side // patch) ** 2


def warn_of_unread(config: PretrainedConfig, kwargs: dict | None) -> None:
    """Tell which settings of the processor were not looked at."""
    if unread := cut(config, kwargs, 1, 1).unread:
        warn(
            f"{', '.join(unread)} in processor_kwargs is not counted for {config.model_type}: if images become more or "
            "larger by it, training takes more than this"
        )


def patches_per_token(config: PretrainedConfig) -> float:
    """How many patches become one token of the language model; 1 where it is not known, which counts too many."""
    vision = config.vision_config
    # Mistral's stands at the top.
    if (merge := max(getattr(part, "spatial_merge_size", 1) for part in (vision, config))) > 1:
        return merge**2
    if config.model_type == "gemma4":
        return vision.pooling_kernel_size**2
    if config.model_type == "lfm2_vl":
        return config.downsample_factor**2
    if config.model_type == "internvl":
        return config.downsample_ratio**-2
    if config.model_type in ("idefics3", "smolvlm"):
        return config.scale_factor**2
    tile = (_side(vision.image_size) // _side(vision.patch_size)) ** 2 if hasattr(vision, "image_size") else 1
    if config.model_type == "gemma3":
        return tile / config.mm_tokens_per_image
    return tile / config.perceiver_config.resampler_n_latents if config.model_type == "idefics2" else 1


def pixel_bytes(config: PretrainedConfig) -> float:
    """Of a patch as the model takes it: three colours in 32 bits for each pixel, whatever the model is trained in."""
    vision = config.vision_config
    edge = _side(vision.patch_size)
    if hasattr(vision, "image_size"):  # what does not fill a patch is there too
        side = _side(vision.image_size)
        edge = side / (side // edge)
    pixel = 3 * 4 * getattr(vision, "temporal_patch_size", 1) + 8 * (config.model_type in MASKED)
    return edge**2 * pixel


def _side(size: int | list | tuple) -> int:
    return size if isinstance(size, int) else size[0]
