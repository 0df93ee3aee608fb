"""`python -m ewma.kernels`: which kernel serves which device, and why."""

from __future__ import annotations

from ewma.kernels import INSTALL, choose, missing


def main() -> None:
    rows = [("device", "kernel", "why")]
    for device, name in (("CPU", "cpu"), ("CUDA", "cuda"), ("all others", "others")):
        kernel, why = choose(name)
        rows.append((device, kernel, why))
    for device, kernel, why in rows:
        print(f"{device:12}{kernel:12}{why}")
    problem = missing()
    if problem:
        print(f"\nTo be fast on the CPU, {INSTALL}")
    else:
        from ewma.kernels import _native

        print(f"\nInstruction sets of this processor, the first one used: {', '.join(_native.instruction_sets())}")


if __name__ == "__main__":
    main()
