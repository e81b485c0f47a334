"""hart-bench --sustained: minutes and what the machine made of them, and energy from files of boards."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from hart_runtime.bench.cli import main
from hart_runtime.bench.energy import Power, find_meter, jetson_rails, rapl_packages
from hart_runtime.bench.sustained import Look, alone, by_minute

I2C = "sys/bus/i2c/drivers"
ORIN = {  # JetPack 6: volts and amperes of each channel, in thousandths, and a sum without a current
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in1_label": "VDD_IN",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in1_input": "5000",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/curr1_input": "2400",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in2_input": "5000",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/curr2_input": "900",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in7_label": "sum of shunt voltages",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon3/in7_input": "17",
}
AGX_ORIN = {  # two monitors, and no rail that feeds all
    f"{I2C}/ina3221/1-0040/hwmon/hwmon2/in1_label": "VDD_GPU_SOC",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon2/in1_input": "20000",
    f"{I2C}/ina3221/1-0040/hwmon/hwmon2/curr1_input": "400",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon3/in2_label": "VIN_SYS_5V0",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon3/in2_input": "5000",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon3/curr2_input": "1000",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon3/in3_label": "NC",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon3/in3_input": "20000",
    f"{I2C}/ina3221/1-0041/hwmon/hwmon3/curr3_input": "8",
}
NANO = {  # JetPack 4: thousandths of watts
    f"{I2C}/ina3221x/6-0040/iio:device0/rail_name_0": "POM_5V_IN",
    f"{I2C}/ina3221x/6-0040/iio:device0/in_power0_input": "3250",
    f"{I2C}/ina3221x/6-0040/iio:device0/rail_name_1": "POM_5V_GPU",
    f"{I2C}/ina3221x/6-0040/iio:device0/in_power1_input": "600",
}
XAVIER = {
    f"{I2C}/ina3221x/1-0040/iio:device0/rail_name_0": "GPU",
    f"{I2C}/ina3221x/1-0040/iio:device0/in_power0_input": "4000",
    f"{I2C}/ina3221x/1-0040/iio:device0/rail_name_1": "CPU",
    f"{I2C}/ina3221x/1-0040/iio:device0/in_power1_input": "1500",
}
SERVER = {  # two processors, a part of one, and all of the board once more
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": "999000000",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "1000000000",
    "sys/class/powercap/intel-rapl:1/name": "package-1",
    "sys/class/powercap/intel-rapl:1/energy_uj": "5000000",
    "sys/class/powercap/intel-rapl:1/max_energy_range_uj": "1000000000",
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "1",
    "sys/class/powercap/intel-rapl:0:0/max_energy_range_uj": "1000000000",
    "sys/class/powercap/intel-rapl:2/name": "psys",
    "sys/class/powercap/intel-rapl:2/energy_uj": "7",
    "sys/class/powercap/intel-rapl:2/max_energy_range_uj": "1000000000",
}


def recorded(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("files", "rails"),
    [
        (ORIN, {"VDD_IN": 12.0}),
        (AGX_ORIN, {"VDD_GPU_SOC": 8.0, "VIN_SYS_5V0": 5.0}),
        (NANO, {"POM_5V_IN": 3.25}),
        (XAVIER, {"GPU": 4.0, "CPU": 1.5}),
        (SERVER, {}),
    ],
)
def test_rails_of_boards(files: dict[str, str], rails: dict[str, float], tmp_path: Path) -> None:
    """What feeds all others is counted alone."""
    found = jetson_rails(recorded(tmp_path, files))
    assert {name: rail() for name, rail in found.items()} == pytest.approx(rails)


def test_a_board_is_measured_by_its_rails_whatever_draws(tmp_path: Path) -> None:
    root = recorded(tmp_path, {**ORIN, **SERVER})
    for device in ("cpu", "cuda"):
        meter = find_meter(device, root=root)
        assert meter is not None
        assert meter.name == "the board, by its rails VDD_IN"


def test_power_is_integrated(tmp_path: Path) -> None:
    """12 W for two seconds, then up to 20 W within two: 24 and 32 joules. What cannot be read is bridged."""
    watts, ticks = iter([12.0, 12.0, 20.0, None, 20.0]), itertools.count(0, 2)
    meter = Power("x", lambda: next(watts), lambda: float(next(ticks)))
    assert [meter.joules() for _ in range(5)] == [0, 24, 56, 56, 136]


def test_counters_begin_anew(tmp_path: Path) -> None:
    root = recorded(tmp_path, SERVER)
    assert [file.parent.name for file in rapl_packages(root)] == ["intel-rapl:0", "intel-rapl:1"]
    meter = find_meter("cpu", root=root)
    assert meter is not None
    assert meter.name == "the processor, by RAPL"
    assert meter.joules() == 0
    recorded(
        root,
        {
            "sys/class/powercap/intel-rapl:0/energy_uj": "2000000",  # beyond its largest: 1 J and 2 J
            "sys/class/powercap/intel-rapl:1/energy_uj": "9000000",
        },
    )
    assert meter.joules() == pytest.approx(3 + 4)


def test_what_may_not_be_read_is_no_meter(tmp_path: Path) -> None:
    assert find_meter("cpu", root=tmp_path) is None
    bare = {name: text for name, text in SERVER.items() if not name.endswith("energy_uj")}
    assert find_meter("cpu", root=recorded(tmp_path, bare)) is None


def test_minutes_are_told_apart() -> None:
    """A machine that gets hot in its second minute; the third is not whole."""
    drawn = [(float(at), 1.0) for at in range(1, 60)] + [(60.0 + 2 * n, 2.0) for n in range(1, 40)]
    looks = [
        Look(float(at), 1500.0 - at, 40 + at / 4, ("temperature",) if at > 90 else (), 10.0 * at)
        for at in range(139)
    ]
    first, second, third = by_minute(drawn, looks, batch=2)
    assert (first.begins, second.begins, third.begins) == (0, 60, 120)
    assert (first.pictures, second.pictures, third.pictures) == (59 * 2, 29 * 2, 10 * 2)
    assert (first.p50, second.p50, second.p99) == (1.0, 2.0, 2.0)
    assert (first.slowed_by, second.slowed_by) == ((), ("temperature",))
    assert (first.mhz, second.celsius) == (1500.0 - 59, 40 + 119 / 4)
    assert first.watts == pytest.approx(10)
    assert first.joules_per_picture == pytest.approx(600 / (59 * 2))
    assert third.joules_per_picture == pytest.approx(10 * 18 / 20)


def test_without_a_meter_there_is_no_energy() -> None:
    (minute,) = by_minute([(1.0, 1.0)], [Look(0.0, None, None, (), None), Look(1.0, None, None, (), None)], 1)
    assert (minute.mhz, minute.celsius, minute.watts, minute.joules_per_picture) == (None,) * 4


def bench(*words: object) -> Any:
    return CliRunner().invoke(main, [*map(str, words)])


def test_a_run_of_seconds(demo_bundle: Path, tmp_path: Path) -> None:
    done = bench("--engine", demo_bundle, "--sustained", "2s", "--batch", 2, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "sustained.json").read_text())
    assert found["seconds"] >= 2
    assert sum(minute["pictures"] for minute in found["minutes"]) == 2 * len(found["drawn"]) > 0
    assert sum(taken for _, taken in found["drawn"]) == pytest.approx(found["seconds"], rel=1e-6)
    assert len(found["looks"]) >= 3
    assert Image.open(tmp_path / "out" / "sustained.png").width > 500
    assert "pictures" in done.output
    assert "p99" in done.output


@pytest.mark.parametrize("time", ["0s", "10", "m", "-1m", "1e9s", "25h", "nan s"])
def test_times_that_are_none(demo_bundle: Path, time: str) -> None:
    done = bench("--engine", demo_bundle, "--sustained", time)
    assert done.exit_code == 2
    assert "expected a time such as 10m, 90s or 1h" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "torch-eager"], "--sustained: draws with the bundle alone, found --against beside it"),
        (["--batch", "1,2"], "--batch: expected one number beside --sustained, found 1,2"),
        (["--batch", "100"], "--batch: expected 1 to "),
    ],
)
def test_what_does_not_go_with_it(demo_bundle: Path, words: list[str], said: str) -> None:
    done = bench("--engine", demo_bundle, "--sustained", "1s", *words)
    assert done.exit_code == 2, done.output
    assert said in done.output


def test_two_at_once_are_refused(demo_bundle: Path, tmp_path: Path) -> None:
    with alone():
        done = bench("--engine", demo_bundle, "--sustained", "1s", "--output", tmp_path / "out")
    assert done.exit_code == 2
    assert done.output == "error: --sustained: another such run goes on here; wait for it, or end it\n"
    with alone():
        assert not (tmp_path / "out").exists()
