from bench import capacity


def test_the_capacity_is_that_of_the_best_width(tiny_folder, capsys):
    found = capacity.measure(tiny_folder, seconds=0.01)
    assert found.rows_per_s == found.by_width[found.rows] == max(found.by_width.values())
    capacity.main(["--model", str(tiny_folder), "--seconds", "0.01"])
    assert capsys.readouterr().out.count("  best\n") == 1
