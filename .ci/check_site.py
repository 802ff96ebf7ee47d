"""Makes sure that the built pages fetch nothing from elsewhere.

    python .ci/check_site.py outputs/site

Prints what a browser would load from another host (scripts, styles, fonts, pictures, frames), and fails if there is
anything. Links that a reader clicks on may lead anywhere.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

ELSEWHERE = re.compile(r"(https?:)?//", re.IGNORECASE)
LOADING_LINKS = {
    "stylesheet",
    "icon",
    "preload",
    "preconnect",
    "prefetch",
    "dns-prefetch",
    "modulepreload",
    "manifest",
}
IN_STYLES = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


class Loads(HTMLParser):
    """Collects the addresses that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        if tag == "link" and LOADING_LINKS & {*values.get("rel", "").lower().split()}:
            self.addresses.append(values.get("href", ""))
        elif tag != "a":
            self.addresses += [values[name] for name in ("src", "data", "poster") if name in values]
            self.addresses += re.findall(r"[^\s,]+(?=\s|,|$)", values.get("srcset", ""))
        self.addresses += addresses_in_styles(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.addresses += addresses_in_styles(data)
            self._in_style = False


def addresses_in_styles(text: str) -> list[str]:
    return [first or second for first, second in IN_STYLES.findall(text)]


def loads_from_elsewhere(site: Path) -> list[tuple[Path, str]]:
    """Pages and styles of a site, with the addresses of other hosts that they load."""
    found = []
    for file in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".css":
            addresses = addresses_in_styles(text)
        else:
            page = Loads()
            page.feed(text)
            addresses = page.addresses
        found += [(file, address) for address in addresses if ELSEWHERE.match(address.strip())]
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1])
    if not (site / "index.html").is_file():
        sys.exit(f"{site} holds no built site: run `make docs`.")
    loads = loads_from_elsewhere(site)
    for file, address in loads:
        print(f"{file.relative_to(site)} loads {address}")
    sys.exit(f"{len(loads)} loads from elsewhere" if loads else 0)
