"""Drift of the total energy of ndem-aspirin in NVE: 10 ps from 300 K, 0.5 fs, float32."""

from __future__ import annotations

import time

from common import machine, parser, write

from ffpretrain.md import simulate


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--model", default="ndem-aspirin")
    args.add_argument("--time-ps", type=float, default=10.0)
    args.add_argument("--dtype", default="float32")
    args.add_argument("--seed", type=int, default=0)
    options = args.parse_args()
    started, hardware = time.perf_counter(), machine()
    result = simulate(
        None,
        options.model,
        ensemble="nve",
        temperature=300.0,
        timestep=0.5,
        time_ps=options.time_ps,
        minimize=True,
        seed=options.seed,
        dtype=options.dtype,
        progress=True,
    )
    print(result.summary)
    write(
        "nve", {"machine": hardware, "model": options.model, "summary": result.summary}, started, options.out
    )


if __name__ == "__main__":
    main()
