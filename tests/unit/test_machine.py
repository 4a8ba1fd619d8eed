"""The description of the processor."""

from pathlib import Path

import pytest

from delethink.training import system

X86 = """processor\t: {i}
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
stepping\t: 1

"""


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (X86.format(i=0) + X86.format(i=1), "2 x AMD EPYC (family 26, model 2)"),
        ("processor\t: 0\nmodel name\t: ARMv7 Processor rev 3\n", "1 x ARMv7 Processor rev 3"),
        ("processor\t: 0\nBogoMIPS\t: 243.75\n", "from the system"),
        (None, "from the system"),
    ],
)
def test_processors_of_one_name_differ_by_family_and_model(
    cpuinfo: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **options: object) -> str:
        assert path == Path("/proc/cpuinfo")
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(system.Path, "read_text", read)
    monkeypatch.setattr(system.platform, "processor", lambda: "from the system")
    assert system.processor() == expected
