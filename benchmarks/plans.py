"""What `grade plan` prints, as Markdown for a page.

    python -m benchmarks.plans imdb_qwen3_4b --gpu h200
    python -m benchmarks.plans imdb_qwen3_4b --gpu h200 --gpus 32 --shards 8 --only sampling --model.name NAME

Options are those of `grade plan`; `--only` prints one part: lines, phases, memory, sampling or suggestions.
"""

from __future__ import annotations

import sys

from benchmarks.saved import new_parser
from grade.commands.plan import planned
from grade.config.reading import load_config
from grade.errors import GradeError
from grade.planning.text import device_line, memory_table, model_line, phase_table, sampling_table, sentences

PARTS = ("lines", "phases", "memory", "sampling", "suggestions")


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("config", help="a shipped config or a YAML file")
    parser.add_argument("--gpu", help="device")
    parser.add_argument("--gpus", type=int, default=1, help="how many")
    parser.add_argument("--shards", type=int, help="devices that hold the base between them")
    parser.add_argument("--hops", type=float, help="of a step")
    parser.add_argument("--only", choices=PARTS, action="append", help="default: all parts")
    options, overrides = parser.parse_known_args(arguments)
    try:
        found = planned(
            load_config(options.config, overrides),
            gpu=options.gpu,
            gpus=options.gpus,
            shards=options.shards,
            hops=options.hops,
        )
    except GradeError as error:
        sys.exit(str(error))
    parts = {
        "lines": f"{model_line(found.run)}\n\n{device_line(found.run)}",
        "phases": phase_table(found).markdown(),
        "memory": memory_table(found).markdown(),
        "sampling": sampling_table(found).markdown(),
        "suggestions": "\n".join(f"- {line}" for line in sentences(found)),
    }
    print("\n\n".join(parts[name] for name in options.only or PARTS))


if __name__ == "__main__":
    main()
