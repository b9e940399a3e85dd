from bench.machine import describe, processor


def test_the_machine_has_a_name(tmp_path):
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 amx_bf16\nprocessor\t: 1\n")
    assert processor(facts) == "Some CPU (avx2, amx_bf16)"
    assert processor(tmp_path / "none")
    found = describe()
    assert isinstance(found["cores"], int)
    assert found["cores"] >= 1
    assert "torch" in found["versions"]  # type: ignore[operator]
