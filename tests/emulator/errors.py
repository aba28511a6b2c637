"""What the emulator raises."""

from __future__ import annotations

from .schedule import Schedule

#: Every kind of report, with what it means.
KINDS = {
    "race": "two accesses of one block's threads, one of them a write, with nothing that orders them",
    "race between blocks": "the same across blocks",
    "uninitialised": "a read of shared or temporary memory that nothing has written",
    "out of bounds": "an access outside shared memory, outside an array, or between its elements",
    "write to an input": "a write to an array that the kernel may only read",
    "misaligned": "a vector access, copy or descriptor at an address that the instruction does not take",
    "early use": "an access to the destination of an asynchronous copy before its end was waited for",
    "early overwrite": "a write to what an asynchronous operation may still read",
    "missing proxy fence": "an asynchronous operation meets ordinary writes with no fence.proxy.async between",
    "missing mbarrier fence": "an asynchronous copy reports to an mbarrier whose initialisation no fence has published",
    "missing wgmma fence": "a wgmma reads registers that were written after the last wgmma.fence",
    "wgmma registers": "registers of an unfinished wgmma are read, written or given to another",
    "mbarrier": "an mbarrier used against its rules: not initialised, overwritten, too many arrivals",
    "barrier": "a barrier used with a wrong number or count",
    "divergence": "lanes of a warp, or threads of a block, that do not meet where they must",
    "unfinished": "a thread or block that ends while its asynchronous work goes on, or a named barrier waits for more",
    "deadlock": "no thread can run; the report says who waits for what",
    "tensor map": "a copy whose tensor map does not fit it",
    "undefined": "undefined behaviour of C++: overflow, a bad shift, a division by zero",
    "misuse": "an instruction with an operand that it does not take",
    "launch": "a launch that the device would refuse",
    "trap": "the kernel trapped",
}


class EmulatorError(RuntimeError):
    """A fault of a kernel, found while it ran on the CPU.

    Attributes
    ----------
    kind : str
        A key of ``KINDS``.
    kernel : str
        The entry point that ran.
    schedule : Schedule
        What runs the same way again.
    """

    def __init__(self, kind: str, message: str, kernel: str, schedule: Schedule) -> None:
        super().__init__(f"{kind} in {kernel}: {message}\n  replay with {schedule!r}")
        self.kind = kind
        self.kernel = kernel
        self.schedule = schedule
