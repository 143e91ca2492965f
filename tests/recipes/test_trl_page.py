"""The row that the documentation's page on TRL shows, as TRL's collator takes it."""

from pathlib import Path

import pytest
from PIL import Image
from test_readme import blocks
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "trl.md"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "smolvlm"])
def test_the_row_of_the_page_has_as_many_places_as_pictures(family, pair):
    given = {}
    exec(blocks(PAGE.read_text(encoding="utf-8"))[0], given)
    images = [Image.new("RGB", (16, 16))] * 2
    rows = [given["row"](image, "3 + 4?", "<think> 3 + 4 = 7 </think> 7") for image in images]
    collate = DataCollatorForVisionLanguageModeling(AutoProcessor.from_pretrained(pair(family) / "base"))
    assert len(collate(rows)["input_ids"]) == 2
    with pytest.raises(ValueError, match="Found total 4 <image> tokens and 2 images"):
        collate([given["row"](image, "<image>3 + 4?", "7") for image in images])
