"""A page in headless Chromium, where there is one, at a width of its own."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH (Debian: apt-get install chromium)")


def in_browser(page, probe, folder, *flags, width=1280):
    """What the probe found on the page in a frame of this width, and what the browser's console says."""
    file = folder / "page.html"
    frame = html.escape(page.replace("</body>", f"{probe}</body>"))
    style = f'style="width: {width}px; height: 900px; border: 0"'
    head = '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    file.write_text(f'{head}<body><iframe srcdoc="{frame}" {style}></iframe></body>', encoding="utf-8")
    options = "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"
    command = [CHROMIUM, *options, f"--user-data-dir={folder / 'profile'}", *flags]
    command += ["--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    dump = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    return (json.loads(html.unescape(dump[1])) if dump else None), console
