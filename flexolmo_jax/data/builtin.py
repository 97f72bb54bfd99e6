"""Four small corpora made on this machine out of what Python itself carries; nothing is downloaded.

  public   English technical prose: pydoc topics and the standard library's docstrings
  code     the standard library's source without docstrings and comments
  math     generated arithmetic, sums worked out and remainders
  unicode  facts of `unicodedata`: code point, category, name

They are deterministic for a given Python version, deduplicated, and no document (in `math` no sum and no remainder, in
`unicode` no code point) of one split appears in another.
"""

import ast
import gzip
import hashlib
import json
import random
import sysconfig
import textwrap
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from flexolmo_jax.data.splits import SPLITS, split_of

MAX_BYTES = {"public": 2_400_000, "code": 900_000, "math": 700_000, "unicode": 700_000}
"""Upper bound on a corpus's text; document order is a stable shuffle, so a cut takes no topic away."""

MAX_DOCUMENT_BYTES = 1_500

Document = tuple[str, str]
"""The split it belongs to, and its text."""


def build(directory: Path) -> dict[str, Path]:
    """Writes every corpus to `directory/<name>/<split>.jsonl.gz` and returns where each one is."""
    modules = list(_modules())
    sources = {"public": _prose(modules), "math": _arithmetic(), "unicode": _characters(), "code": _code(modules)}
    return {name: _write(directory / name, documents, MAX_BYTES[name]) for name, documents in sources.items()}


def _write(directory: Path, documents: Iterator[Document], max_bytes: int) -> Path:
    """Writes each text once, in the order of a stable hash, up to `max_bytes` of text."""
    by_hash = {hashlib.sha256(" ".join(text.split()).encode()).hexdigest(): (split, text) for split, text in documents}
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    written = 0
    for digest in sorted(by_hash):
        split, text = by_hash[digest]
        written += len(text.encode())
        if written > max_bytes:
            break
        lines[split].append(json.dumps({"text": text, "id": digest[:16]}, ensure_ascii=False) + "\n")
    directory.mkdir(parents=True, exist_ok=True)
    for split, content in lines.items():
        with (directory / f"{split}.jsonl.gz").open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            file.write("".join(content).encode())
    return directory


def _modules() -> Iterator[ast.Module]:
    """The standard library's modules, tests and vendored packages left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in ("site-packages", "test", "pydoc_data", "turtledemo")):
            continue
        try:
            yield ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue


def _definitions(module: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def _pieces(text: str, separator: str = "\n\n") -> Iterator[str]:
    """Cuts a text at paragraph ends into documents of at most `MAX_DOCUMENT_BYTES` (a longer paragraph is cut hard)."""
    piece = ""
    for paragraph in text.split(separator):
        if piece and len(piece) + len(paragraph) > MAX_DOCUMENT_BYTES:
            yield piece
            piece = ""
        piece = f"{piece}{separator}{paragraph}" if piece else paragraph[:MAX_DOCUMENT_BYTES]
    yield piece


def _prose(modules: list[ast.Module]) -> Iterator[Document]:
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    for module in modules:
        docstrings = [ast.get_docstring(node) for node in [module, *_definitions(module)]]
        texts += [docstring for docstring in docstrings if docstring]
    for text in texts:
        for piece in _pieces(text):
            if len(piece) >= 40:
                text = piece.strip() + "\n"
                yield split_of(text), text


class _WithoutDocstrings(ast.NodeTransformer):
    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(ast.Constant(str())), *rest]:
                    node.body = rest or [ast.Pass()]
        return node


def _code(modules: list[ast.Module]) -> Iterator[Document]:
    for module in modules:
        bare = _WithoutDocstrings().visit(module)
        for node in _definitions(bare):
            if isinstance(node, ast.ClassDef):
                continue
            source = textwrap.dedent(ast.unparse(ast.fix_missing_locations(node)))
            if 80 <= len(source) <= MAX_DOCUMENT_BYTES:
                yield split_of(source), source + "\n"


def worked_sum(a: int, b: int) -> str:
    """A question and its worked answer: `Q: 47 + 36 = ?` and `A: 7 + 6 = 13, 4 + 3 + 1 = 8: 83`."""
    (tens, units), (other_tens, other_units) = divmod(a, 10), divmod(b, 10)
    total = units + other_units
    carry = total // 10
    steps = f"{units} + {other_units} = {total}, {tens} + {other_tens} + {carry} = {tens + other_tens + carry}"
    return f"Q: {a} + {b} = ?\nA: {steps}: {a + b}\n"


def remainder(number: int, divisor: int) -> str:
    """A remainder: `remainder by 5 of 471: 1`."""
    return f"remainder by {divisor} of {number}: {number % divisor}\n"


def _arithmetic() -> Iterator[Document]:
    yield from _grouped([worked_sum(a, b) for a in range(100) for b in range(100)], most=5)
    yield from _grouped([remainder(number, 5) for number in range(1, 20_000)], most=8)


def _characters() -> Iterator[Document]:
    names = ((code, unicodedata.name(chr(code), "")) for code in range(0x20, 0x30000))
    facts = [f"U+{code:04X} {unicodedata.category(chr(code))} {name}\n" for code, name in names if name]
    yield from _grouped(facts, most=6)


def _grouped(entries: list[str], most: int) -> Iterator[Document]:
    """Deals entries into the splits, and joins 1 to `most` shuffled ones of a split into a document."""
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for entry in entries:
        by_split[split_of(entry)].append(entry)
    for split, mine in by_split.items():
        rng = random.Random(split)
        rng.shuffle(mine)
        start = 0
        while start < len(mine):
            count = rng.randint(1, most)
            yield split, "".join(mine[start : start + count])
            start += count
