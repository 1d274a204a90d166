"""Texts that break what shows them, and a folder of runs that is full of them."""

from __future__ import annotations

import json
from pathlib import Path

from report_runs import write_run

TEXTS = {
    "mathematics": r"$\frac{$ and $x$ and $",
    "input": r"\input{/etc/passwd} \write18{touch owned} \end{tabular}\end{document}",
    "special": "% & # _ { } ~ ^ ^^41 ^^M \\ \\\\ [1em] *[2em] | < > `` '' ,, -- --- ?` !` \"",
    "controls": "".join(map(chr, range(32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
    "surrogates": "a\ud800b\udfff c",
    "separators": "one\u2028two\u2029three\x85four\x0bfive",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 ✅ 😀",
    "CJK": "漢字かな交じり文、한국어 텍스트",
    "Arabic": "مرحبا بالعالم \u202eoverride\u202c \u2066isolate\u2069",
    "scripts": "Ελληνικά Русский עברית हिन्दी ไทย đðþĦŋſ ǅ ﬁ n̈ \ufeff\ufffe\U0010ffff",
    "long": "W" * 3000,
    "long CJK": "漢" * 5000,
    "markup": "<script>document.title='owned'</script><img src=x onerror=alert(1)></p></table>&amp;<!-- ]]>",
    "formula": '=HYPERLINK("http://example.com","x")',
    "option": "[3em] and *",
    "nothing": "",
}
METHODS = [r"$\frac{$", "<b>&amp;</b>\u202e\x07", "=1+1", "_x\ud800漢"]


def write_hostile(folder: Path) -> Path:
    """Runs of methods with such names, two told apart by such settings, with such samples."""
    models = [TEXTS["mathematics"], TEXTS["markup"]]
    for number, (method, model) in enumerate([*((method, models[0]) for method in METHODS), (METHODS[0], models[1])]):
        run = write_run(
            folder / f"run{number} <i>$",
            method=method,
            seed=number,
            settings={"model.name": model, "task.dataset": TEXTS["special"]},
        )
        evaluations = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        for row in (*evaluations["validation"], *evaluations["test"].values()):
            row["samples"] = samples(row["step"], 8 * number)
        (run / "evaluation.json").write_text(json.dumps(evaluations), encoding="utf-8")
    return folder


def samples(step: int, first: int) -> list[dict]:
    """Each text as prompt and as response, from the one numbered `first` on; the page shows eight of them."""
    texts = list(TEXTS.values())
    first %= len(texts)
    return [
        {"prompt": text, "response": f"{text}{' after' * bool(step)}", "reward": 0.1 + 0.01 * step * (-1) ** i}
        for i, text in enumerate(texts[first:] + texts[:first])
    ]
