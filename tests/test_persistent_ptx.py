"""NVRTC and ptxas compile persistent.cu for the published sizes: the weights fit the registers, nothing is spilled."""

import pytest
from test_persistent import CARDS
from test_qrnn_cuda import ptxas_report

from layers import nvrtc, persistent
from layers.persistent import choose_sizes

COMPILED = [  # cell, H, B, GPU; docs/gpu.md has the table of all of them
    *(("LSTM", 1150, 20, name) for name in ("A100", "H100", "B200", "RTX 5090")),
    ("MELIS", 951, 64, "RTX 5090"),
    ("GRU", 1150, 20, "H100"),
]


@pytest.mark.parametrize(("cell", "H", "B", "name"), COMPILED)
def test_nothing_is_spilled(cell, H, B, name, tmp_path):
    """At most the 255 registers that a thread can have, no stack, no shared memory beside what the launch asks for."""
    card = CARDS[name]
    architecture = "".join(map(str, card.capability))
    ptx = nvrtc.compile_ptx(persistent.SOURCE, f"compute_{architecture}", choose_sizes(cell, H, B, card).options())
    entries, report = ptxas_report(ptx, architecture, tmp_path)
    assert sorted(name for name, *_ in entries) == ["persistent_backward", "persistent_forward"]
    for kernel, *memory, registers in entries:
        assert memory == ["0", "0", "0"], kernel
        assert int(registers) <= 255, kernel
    assert "bytes smem" not in report
