"""README.md and the documentation site, made without a Quarto binary.

    python tools/docs.py readme   nbs/index.ipynb -> README.md
    python tools/docs.py site     the notebooks -> _docs/
    python tools/docs.py check    README.md is fresh, the site builds, every link inside both leads somewhere, every
                                  page is in the sidebar and every entry of the sidebar is a page; where there is a
                                  Chromium, every page is looked at in it

Where Quarto is installed, `nbdev-docs` builds the site from the same `_quarto.yml`.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Event, Thread
from urllib.parse import quote, unquote, urlsplit

import pypandoc
import yaml
from nbdev.doclinks import nbglob
from nbdev.serve import proc_nbs
from smalldocs import site as smalldocs
from smalldocs.config import load

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SITE_URL = re.search(r"site-url: (\S+)", (ROOT / "_quarto.yml").read_text(encoding="utf-8"))[1] + "/"
# The path in [text](path), ![alt](path) and <img src="path">
README_LINK = re.compile(r"""(\]\(|src=")(?![a-z]+:)([^\s)"#]+)""")
# A file or folder of this repository, on GitHub or opened from there
OWN_FILE = re.compile(r"https://.*github(?:\.com)?/noisy-student/noisy_student/(?:blob|tree)/main/([^#?]+)")
# In a signature: the modules before the name of a type; a class as Python prints it
PACKAGES = "__main__|noisy_student|pathlib|collections|typing|numpy|pandas|torch|fastai|PIL|matplotlib"
MODULES = re.compile(rf"(?<=[\[:=( |])(?:{PACKAGES})\.(?:\w+\.)*(?=[A-Z]|ndarray|device)")
CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
EVENTS = re.compile(r"(?:\s*(?:after|before)_\w+:NoneType=None,?){10,}")


def readme() -> str:  # The text of README.md
    "Put the cells of index.ipynb one after another: their Markdown is GitHub's, code and its output get fences."
    parts = ["<!-- Made from nbs/index.ipynb by tools/docs.py: edit the notebook. -->"]
    for i, cell in enumerate(json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if i == 1:  # below the title; not on the site, which shows no picture of other servers
            parts.append(badges())
        if cell["cell_type"] == "markdown":
            # The site's root is nbs/, the README's is the repository.
            parts.append(README_LINK.sub(lambda m: m[1] + ("nbs/" if (NBS / m[2]).exists() else "") + m[2], source))
        elif cell["cell_type"] == "code":
            parts.append("```python\n" + re.sub(r"^#\|.*\n?", "", source, flags=re.M) + "\n```")
            parts += [output_text(out) for out in cell["outputs"]]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def badges() -> str:  # One line of Markdown
    """Pictures that link to the tests, the license, the Python versions and the documentation, by what settings.ini
    says."""
    c = ConfigParser(delimiters=["="])
    c.read(ROOT / "settings.ini", encoding="utf-8")
    c = c["DEFAULT"]
    repo, shield = f"https://github.com/{c['user']}/{c['repo']}", "https://img.shields.io/badge"
    return " ".join([
        f"[![tests]({repo}/actions/workflows/test.yml/badge.svg)]({repo}/actions/workflows/test.yml)",
        f"[![docs]({shield}/docs-{c['user'].replace('-', '--')}.github.io-blue)]({c['doc_host']}{c['doc_baseurl']})",
        f"[![Python {c['min_python']} or newer]({shield}/python-{c['min_python']}%2B-blue)]"
        f"({repo}/blob/{c['branch']}/settings.ini)",
        f"[![Apache 2.0]({shield}/license-Apache%202.0-blue)]({repo}/blob/{c['branch']}/LICENSE)",
    ])


def output_text(out: dict) -> str:  # Its Markdown
    "Write one output of a code cell as Markdown; a picture is refused, because Markdown can only link to one."
    data = out.get("data", {"text/plain": out.get("text", "")})
    if any(kind.startswith("image/") for kind in data):
        sys.exit("nbs/index.ipynb: a code cell's output is a picture: save it under nbs/images/ and link it")
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    return "```text\n" + "".join(data["text/plain"]).rstrip() + "\n```"


def mathml(tex: list[tuple[str, bool]]) -> list[str]:  # The formula's MathML, each
    "Convert TeX formulas, `(source, display)`, to MathML, which browsers show without a script and without a network."
    source = "\n\n".join(f"$${t}$$" if display else f"${t}$" for t, display in tex)
    found = re.findall(r"<math.*?</math>", pypandoc.convert_text(source, "html", "markdown", ["--mathml"]), re.S)
    if len(found) != len(tex):
        sys.exit("formulas that pandoc cannot read are among: " + "; ".join(t for t, _ in tex))
    return found


def code_lines(code: str) -> str:  # Highlighted code, each line in a `<span class="line">` that knows its indentation
    "Do as Pandoc does: a style sheet can then set the wrapped rest of a long line further in than its beginning."
    lines, opened = [], []
    for line in code.removesuffix("\n").split("\n"):
        before = "".join(opened)
        for tag in re.findall(r"<[^>]+>", line):
            if tag.startswith("</"):
                opened.pop()
            else:
                opened.append(tag)
        after = "".join("</" + re.match(r"<(\w+)", tag)[1] + ">" for tag in reversed(opened))
        indent = min(len(re.match(" *", re.sub("<[^>]+>", "", line))[0]), 8)
        lines.append(f'<span class="line" style="--in:{indent}ch">{before}{line}{after}\n</span>')
    return "".join(lines)


class Site(smalldocs.Site):
    "smalldocs, for pages as nbdev leaves them and for readers without a network."

    def read(self, src: PurePosixPath) -> smalldocs.Page:
        page = super().read(src)
        # nbdev names a page without the number of its notebook, 03h_losses.ipynb ->
        # losses.html, and links to that name.
        page.out = page.out.with_name(page.front.get("output-file", page.out.name))
        # The social card is the site's, also for pages in folders.
        page.front.setdefault("image", "/" + self.project.website["image"])
        # nbdev also links the `names` in the comments of a signature, where the link would stand as Markdown.
        # In signatures it writes types with their modules, __main__ for those of the notebook itself.
        def clean(block: re.Match) -> str:
            text = re.sub(r"\[(`[^`]+`)\]\(\S+?\)", r"\1", block[0])
            if not text.startswith("```python\ndef "):
                return text
            text = EVENTS.sub("\n    **events, # functions, as every fastai `Callback` takes them", text)
            return MODULES.sub("", CLASS.sub(r"\1", text))
        page.body = re.sub(r"^```.*?^```", clean, page.body, flags=re.M | re.S)
        page.body = page.body.replace("\b", "")  # with which the command line keeps lines of its help apart
        return page

    def find_page(self, target: PurePosixPath) -> smalldocs.Page | None:
        return super().find_page(target) or next((p for p in self.pages.values() if p.out == target), None)

    def resolve(self, href: str, page: smalldocs.Page | None, record: bool = True) -> str:
        "nbdev links `names` to the published site: here they stay within the site that is being built."
        if href.startswith(self.project.website["site-url"]):  # methods and private names have no heading of their own
            href = re.sub(r"#(_.*|.*\..*)$", "", href)
        return super().resolve(href.removeprefix(self.project.website["site-url"]), page, record)

    def render_page(self, page: smalldocs.Page) -> None:
        super().render_page(page)
        page.html = re.sub(r"(<pre[^>]*><code[^>]*>)(.*?)(</code></pre>)", lambda m: m[1] + code_lines(m[2]) + m[3],
                           page.html, flags=re.S)
        pattern = r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>'
        tex = [(unescape(m[2]), m[1] == "display") for m in re.finditer(pattern, page.html, re.S)]
        if tex:
            formulas = iter(mathml(tex))
            page.html = re.sub(pattern, lambda m: next(formulas), page.html, flags=re.S)
        page.env["math"] = False


def build(
    out: Path,  # Folder to write, empty or an earlier site
) -> list[str]:  # What smalldocs warned of, broken links among it
    "Process the notebooks as nbdev does and build the site from the result."
    site = Site(load(proc_nbs(force=True, n_workers=0)), quiet=True)  # see `main`: workers end as slowly
    site.out = out
    site.build()
    for page in out.rglob("*.llms.md"):  # where nbdev's line in the docstring of a module leads
        shutil.copy(page, page.with_name(page.name.replace(".llms.md", ".html.md")))
    # `Site.read` reads output-file, styles.css does what grid and code-overflow do for Quarto.
    known = ("output-file is not read by smalldocs", "format.html.grid is ignored",
             "format.html.code-overflow is ignored")
    return [w for w in site.warnings if not w.endswith(known)]


class Links(HTMLParser):
    "The anchors of a page, and the links and pictures in it."

    def __init__(self, page: Path):
        super().__init__()
        self.ids, self.refs, self.card = {""}, [], None
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        for key, value in attrs:
            if key == "id":
                self.ids.add(value)
            elif key in ("href", "src") and value:
                self.refs.append(value)
        if tag == "meta" and dict(attrs).get("property") == "og:image":
            self.card = dict(attrs)["content"]


def broken_links(
    site: Path,  # Folder of a built site
) -> list[str]:  # A line for each link that leads nowhere, with the pages it is on
    """Follow every link to the site and to files of the repository: the file and, within a page, the anchor must be
    there."""
    pages = {p: Links(p) for p in sorted(site.rglob("*.html"))}
    broken = {}
    for page, links in pages.items():
        for ref in links.refs:
            if (file := OWN_FILE.match(ref)) and not (ROOT / unquote(file[1])).exists():
                broken.setdefault(ref, set()).add(page.relative_to(site).as_posix())
            url = urlsplit(ref.removeprefix(SITE_URL))
            if url.scheme or url.netloc:
                continue
            here = site if ref.startswith(SITE_URL) else page.parent
            target = (here / unquote(url.path)).resolve() if url.path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (target in pages and unquote(url.fragment) not in pages[target].ids):
                broken.setdefault(ref, set()).add(page.relative_to(site).as_posix())
        if links.card and not (site / links.card.removeprefix(SITE_URL)).is_file():
            broken.setdefault(links.card, set()).add(page.relative_to(site).as_posix())
    return [f"broken link {ref} in {', '.join(sorted(on))}" for ref, on in broken.items()]


# Opens the pages named in its fragment one after the other, wide and narrow, light and dark, and sends what is wrong
# with them to the server. A site may clip what is too wide, and the page is then no wider: so elements are looked at,
# too.
LOOK = """<!doctype html><title>look</title><link rel="icon" href="data:,"><body><script>
const found = [], frame = document.createElement('iframe');
const say = text => found.push(text);
async function look(page) {
  frame.style.cssText = 'width:1400px;height:900px;border:0';
  await new Promise(done => { frame.onload = done; frame.src = page; });
  const w = frame.contentWindow, d = w.document, root = d.documentElement;
  for (const img of d.images) {
    img.loading = 'eager';
    await img.decode().catch(() => say(`${page}: the picture ${img.getAttribute('src').slice(0, 80)} does not load`));
  }
  const scrolls = e => e && e !== d.body
    && (/auto|scroll/.test(w.getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  for (const theme of ['light', 'dark']) {
    const done = () => root.classList.contains('quarto-dark') === (theme === 'dark');
    if (w.smalldocsToggleScheme && !done()) {
      w.smalldocsToggleScheme();
      for (let i = 0; i < 100 && !done(); i++) await new Promise(later => setTimeout(later, 20));
      if (!done()) say(`${page}: there is no ${theme} theme`);
    }
    for (const width of [1400, 390]) {
      frame.style.width = `${width}px`;
      const at = `${page}: at ${width} px, ${theme},`, inside = root.clientWidth;
      if (root.scrollWidth > inside) say(`${at} it is ${root.scrollWidth} px wide`);
      const out = [...d.body.querySelectorAll('main :not(pre *)')].find(
        e => e.getBoundingClientRect().right > inside + 1 && e.getClientRects().length && !scrolls(e));
      if (out) say(`${at} this does not fit: ${out.outerHTML.slice(0, 80)}`);
    }
  }
}
(async () => {
  document.body.append(frame);
  for (const page of decodeURIComponent(location.hash.slice(1)).split(' ')) await look(page);
  await fetch('/found', {method: 'POST', body: JSON.stringify(found)});
})();
</script>"""


def chromium() -> str | None:  # Its path
    "The first Chromium that is installed."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def look(
    site: Path,  # Folder of a built site
) -> list[str] | None:  # A line for each fault; None if there is no Chromium
    """Open every page in a headless Chromium, wide and narrow, light and dark: no error, no missing picture, nothing
    too wide."""
    if (browser := chromium()) is None:
        return None
    pages = " ".join(p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html")) if "site_libs" not in p.parts)
    found, done = [], Event()

    def receive(self) -> None:
        found.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()
        done.set()

    handler = type("Quiet", (SimpleHTTPRequestHandler,), dict(log_message=lambda *args: None, do_POST=receive))
    (site / "look.html").write_text(LOOK, encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=site))
    with server, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        Thread(target=server.serve_forever, daemon=True).start()
        flags = ("--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking "
                 "--enable-logging=stderr")
        # The themes ask for fonts of other servers: without a network each page would wait for them for seconds.
        command = [browser, *flags.split(), "--no-proxy-server", f"--user-data-dir={home}/profile",
                   "--remote-debugging-port=0", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        with open(f"{home}/log", "w+", encoding="utf-8", errors="replace") as log:
            url = f"http://127.0.0.1:{server.server_port}/look.html#{quote(pages)}"
            process = subprocess.Popen([*command, url], stdout=subprocess.DEVNULL, stderr=log)
            if not done.wait(timeout=600):
                found.append("Chromium did not get through all pages in 600 seconds")
            process.terminate()
            process.wait()
            server.shutdown()
            log.seek(0)
            console = [line.strip() for line in log if ":CONSOLE" in line]
    (site / "look.html").unlink()
    return found + console


def sidebar_problems(
    config: dict,  # What is in _quarto.yml
    pages: set[str],  # Sources of all pages, relative to nbs/
) -> list[str]:  # A line for each page that is not in the sidebar, and for each entry that leads nowhere
    "Compare the sidebar with the pages that there are; for pages that the navigation bar names, too."

    def named(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        if isinstance(entry, list):
            return [name for e in entry for name in named(e)]
        own = [entry["href"]] if "href" in entry and "://" not in entry["href"] else []
        return own + named(entry.get("contents", [])) + named(entry.get("left", [])) + named(entry.get("right", []))

    listed, bar = named(config["website"]["sidebar"]), named(config["website"]["navbar"])
    return [
        *(f"_quarto.yml: {name} is not in the sidebar" for name in sorted(pages - set(listed))),
        *(f"_quarto.yml: {name} in the sidebar is not there" for name in sorted(set(listed) - pages)),
        *(f"_quarto.yml: {name} is in the sidebar twice"
          for name in sorted({n for n in listed if listed.count(n) > 1})),
        *(f"_quarto.yml: {name} in the navigation bar is not there" for name in sorted(set(bar) - pages)),
    ]


def check() -> list[str]:  # What is wrong, a line each
    "Look for everything that a reader of README.md or of the site would stumble over."
    text, problems = readme(), []
    if (ROOT / "README.md").read_text(encoding="utf-8") != text:
        problems.append("README.md is not what nbs/index.ipynb gives: python tools/docs.py readme")
    problems += [f"README.md: {m[2]} is not there" for m in README_LINK.finditer(text) if not (ROOT / m[2]).exists()]
    for p in nbglob(NBS, as_path=True):
        if re.search(r"^>.*\n>", "".join(json.loads(p.read_text(encoding="utf-8"))["cells"][0]["source"]), re.M):
            problems.append(f"{p.name}: the description goes over two lines, of which the site shows one")
    pages = {p.relative_to(NBS).as_posix() for p in [*nbglob(NBS, as_path=True), *NBS.rglob("[!_.]*.md")]}
    problems += sidebar_problems(yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8")), pages)
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp).resolve() / "site"
        problems += [w for w in build(out) if ": broken link " not in w] + broken_links(out) + (look(out) or [])
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["readme", "site", "check"])
    command = parser.parse_args().command
    os.chdir(ROOT)  # nbdev finds its settings from the working directory
    if command == "readme":
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
        return
    problems = build(ROOT / "_docs") if command == "site" else check()
    print("\n".join(problems) or f"{command}: nothing to report", flush=True)
    os._exit(bool(problems))  # else each of nbdev's hundred and more shells collects all garbage first: minutes


if __name__ == "__main__":
    main()
