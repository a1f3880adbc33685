"""Build the documentation site, and check every link in what was built; or serve it.

    python scripts/build_site.py                            # build/site; any warning or dead link is an error
    python scripts/build_site.py --serve [--port 8000]      # on this machine, built anew at each change

The pages link to each other, and to recipes and results, as they lie in the repository, so they read as well on a code
host. The site therefore is built from a folder of symbolic links that mirrors the repository (build/pages). Where the
repository has an address (REPOSITORY_URL, or GitHub's variables in its CI), links to sources lead there. Nothing is
fetched: of links to other sites only the form is checked, and a page that would load anything from one is an error.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gpt2repro.errors import Parser, UserError, run_script
from gpt2repro.files import CHECKOUT


PAGES = CHECKOUT / "build" / "pages"
SITE = CHECKOUT / "build" / "site"
FILES = ("*.md", "*.py", "LICENSE", "Makefile")
FOLDERS = ("accelerate_configs", "benchmarks", "docs", "gpt2repro", "notebooks", "recipes", "scripts", "tests")
PUBLISHED = FILES + FOLDERS
SOURCES = {".py", ".yaml", ".ipynb", ".json", ".sbatch", ".sh"}
LOADED = {"script": "src", "link": "href", "img": "src", "source": "srcset", "iframe": "src", "video": "src"}


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--serve", action="store_true", help="serve the site instead of building it")
    parser.add_argument("--port", type=int, default=8000, help="to serve on (default: %(default)s)")
    args = parser.parse_args(argv)
    link_pages()
    what = ["serve", "--dev-addr", f"127.0.0.1:{args.port}"] if args.serve else ["build", "--strict"]
    url = repository_url()
    # What the first tells is in CONTRIBUTING.md.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"} | ({"REPOSITORY_URL": url} if url else {})
    code = subprocess.run(
        [sys.executable, "-m", "mkdocs", what[0], *what[1:]], cwd=CHECKOUT, env=environment
    ).returncode
    if args.serve:
        return
    problems = ["mkdocs found what is above"] if code else link_problems(SITE)
    if problems:
        raise UserError("\n".join(problems))
    if url:
        link_sources(SITE, url)
    print(f"{len(list(SITE.rglob('*.html')))} pages, no dead link: {SITE.relative_to(CHECKOUT)}")


def link_pages() -> None:
    """Make build/pages anew: a symbolic link to everything that is published, where it lies in the repository."""
    PAGES.mkdir(parents=True, exist_ok=True)
    for old in PAGES.iterdir():
        old.unlink()
    for pattern in PUBLISHED:
        for path in CHECKOUT.glob(pattern):
            (PAGES / path.name).symlink_to(path)


def repository_url() -> str:
    """Where a reader finds the repository; empty if that is unknown."""
    name = os.environ.get("GITHUB_REPOSITORY")
    known = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{name}" if name else ""
    return os.environ.get("REPOSITORY_URL", known).rstrip("/")


def link_sources(site: Path, url: str) -> None:
    """Let links to files that are no pages and no pictures lead to the repository, where they are shown, not saved."""
    for page in site.rglob("*.html"):

        def linked(match: re.Match, page: Path = page) -> str:
            target = (page.parent / match[1]).resolve()
            is_source = target.suffix in SOURCES and (CHECKOUT / target.relative_to(site)).is_file()
            return f'href="{url}/blob/main/{target.relative_to(site)}"' if is_source else match[0]

        page.write_text(re.sub(r'href="((?:\.\./)*[\w./-]+)"', linked, page.read_text()))


# ---- checking what was built ----


class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in LOADED and LOADED[tag] in values and values.get("rel") != "canonical":
            self.loaded.append(values[LOADED[tag]])


def link_problems(site: Path) -> list[str]:
    """One line for each link of a built site that leads nowhere, and for each thing that is loaded from elsewhere."""
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    return [f"{path.relative_to(site)}: {problem}" for path in sorted(pages) for problem in problems_of(path, pages)]


def problems_of(path: Path, pages: dict[Path, Page]) -> Iterator[str]:
    if path.name == "404.html":  # served at any depth, so its links are absolute
        return
    page = pages[path]
    for link in page.loaded:
        if urlsplit(link).scheme not in ("", "data") or link.startswith("//"):
            yield f"loads {link} from elsewhere"
        elif not link.startswith("data:") and not (path.parent / unquote(urlsplit(link).path)).exists():
            yield f"loads {link}, which does not exist"
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            if parts.scheme not in ("https", "mailto") or " " in link or (parts.scheme == "https" and not parts.netloc):
                yield f"{link} is no https address"
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            yield f"{link} leads nowhere"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
            yield f"{link}: there is no #{parts.fragment}"


if __name__ == "__main__":
    run_script(main)
