"""The contact sheet of a keep set in a browser: on a phone and on a desk."""

import pytest
from browser import browser, in_browser

from drift_peft import KeepSet
from drift_peft.keeping.page import render_page

PROBE = """<script>{
const found = {width: innerWidth, title: document.title, heading: document.querySelector("h1").textContent};
found.wider = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.columns = getComputedStyle(document.querySelector(".sheet")).gridTemplateColumns.split(" ").length;
found.pictures = [...document.images].filter((image) => image.complete && image.naturalWidth).length;
found.next = document.querySelector("pre").textContent;
parent.document.body.append(
  Object.assign(document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)}));
}</script>"""


@browser
@pytest.mark.parametrize("width, columns", [(390, 1), (1280, 4)])
def test_it_fits_a_phone_and_a_desk(folder, tmp_path, width, columns):
    keep_set = KeepSet.load(folder / "keep.safetensors")
    keep_set.metadata["vlm"]["id"] = "/" + "a-long-folder/" * 20 + "my-vlm"
    keep_set.metadata["answers"][0] = "unbroken" * 50
    page = render_page(keep_set).replace("style-src", "script-src 'unsafe-inline'; style-src")  # for the probe
    page = page.replace(' loading="lazy"', "")  # else a picture comes when it is scrolled to
    found, console = in_browser(page, PROBE, tmp_path, width=width)
    assert console == [] and (found["width"], found["wider"], found["columns"]) == (width, 0, columns)
    assert found["title"] == found["heading"] == "Keep set of my-vlm" and found["pictures"] == len(keep_set)
    assert found["next"] == 'keep(model, "keep.safetensors", processor)'
