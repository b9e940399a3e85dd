from bench import capacity


def test_the_capacity_is_that_of_the_best_batch_size(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(capacity, "BATCH_SIZES", (1, 2, 4))
    found = capacity.measure(tiny_folder, seconds=0.01)
    assert found.rows_per_s == found.by_batch_size[found.batch_size] == max(found.by_batch_size.values())

    monkeypatch.setattr(capacity, "measure", lambda *_: found)
    capacity.main([])
    printed = capsys.readouterr().out
    assert printed.count("rows/s") == 3
    assert printed.count("  best\n") == 1
