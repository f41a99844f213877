"""Opens pages in a headless Chromium and says what a reader would find broken."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: width and height of a phone, in CSS pixels
PHONE = (390, 844)

#: Pictures that did not load; what reaches beyond the window and does not scroll in itself; formulas without size.
_LOOK = """(() => {
  const wide = [...document.querySelectorAll('body *')].filter(e => {
    if (e.getBoundingClientRect().right <= WIDTH + 1 || e.closest('aside, .sidebar-drawer, .toc-drawer, .visually-hidden')) return false;
    for (let p = e; p; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible' && p !== document.body
        && p !== document.documentElement) return false;
    return true;
  });
  return {
    width: document.documentElement.scrollWidth,
    wide: wide.slice(0, 3).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.trim().slice(0, 60)),
    pictures: [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src.slice(0, 80)),
    formulas: [...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().width === 0).length,
    errors: document.querySelectorAll('merror').length,
  };
})()"""


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def faults(pages: Sequence[Path], pictures: Path | None = None) -> dict[str, list[str]]:
    """What is broken on each page at the width of a phone; an empty dict where nothing is.

    Args:
        pictures: a folder to write a screenshot of every page into.
    """
    return asyncio.run(_faults(pages, pictures))


async def _faults(pages: Sequence[Path], pictures: Path | None) -> dict[str, list[str]]:
    import aiohttp

    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            "--remote-allow-origins=*",
        ]
        browser = subprocess.Popen(
            [str(chromium()), *options, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            ready = Path(profile) / "DevToolsActivePort"
            while not ready.exists() or "\n" not in ready.read_text():
                await asyncio.sleep(0.1)
            port = ready.read_text().splitlines()[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    [target, *_] = [one for one in await answer.json() if one["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = _Tab(socket)
                    for page in pages:
                        said = await tab.look(page, pictures)
                        if said:
                            found[page.name] = said
        finally:
            browser.terminate()
            browser.wait()
    return found


class _Tab:
    """One tab, over Chromium's DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._numbers, self._failed = socket, itertools.count(1), list[str]()

    async def _call(self, method: str, until: str = "", **parameters: Any) -> dict[str, Any]:
        """The answer to a call; with `until`, that event has come as well."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        answer: dict[str, Any] | None = None
        waiting = bool(until)
        while answer is None or waiting:
            message = json.loads((await self._socket.receive(timeout=60)).data)
            if message.get("id") == number:
                answer = message.get("result", {})
            event, about = message.get("method"), message.get("params", {})
            waiting = waiting and event != until
            if event == "Network.loadingFailed" and not about.get("canceled"):
                self._failed.append(f"a file did not load: {about['errorText']}")
            elif event == "Network.requestWillBeSent" and not about["request"]["url"].startswith(("file:", "data:")):
                self._failed.append(f"asks the network for {about['request']['url']}")
            elif event == "Runtime.exceptionThrown":
                self._failed.append(f"script: {about['exceptionDetails']['text']}")
        return answer

    async def look(self, page: Path, pictures: Path | None) -> list[str]:
        self._failed = []
        width, height = PHONE
        for domain in ("Page", "Network", "Runtime"):
            await self._call(f"{domain}.enable")
        await self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True
        )
        await self._call("Page.navigate", until="Page.loadEventFired", url=page.resolve().as_uri())
        # pictures further down load when they come into view
        await self._call(
            "Runtime.evaluate",
            expression="Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode().catch(() => 0))))",
            awaitPromise=True,
        )
        seen = (
            await self._call("Runtime.evaluate", expression=_LOOK.replace("WIDTH", str(width)), returnByValue=True)
        )["result"]["value"]
        if pictures is not None:
            import base64

            shot = await self._call("Page.captureScreenshot", format="png", captureBeyondViewport=False)
            pictures.mkdir(parents=True, exist_ok=True)
            (pictures / f"{page.stem}.png").write_bytes(base64.b64decode(shot["data"]))
        said = list(self._failed)
        if seen["width"] > width:
            said.append(f"the page scrolls sideways: {seen['width']} px wide, for {seen['wide']}")
        said += [f"a picture is not there: {source}" for source in seen["pictures"]]
        said += [f"{seen['formulas']} formulas have no size"] * bool(seen["formulas"])
        said += [f"{seen['errors']} formulas are wrong"] * bool(seen["errors"])
        return said
