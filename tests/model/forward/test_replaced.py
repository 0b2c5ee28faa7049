"""What is replaced comes back as it was, whatever lay there before."""

from types import SimpleNamespace

from torch import nn

from medusa_serve.model.forward.replaced import replace_attributes


def test_objects_are_given_back_as_they_were():
    layer, plain = nn.Linear(2, 2), SimpleNamespace(run="own")
    undo = replace_attributes([(layer, "forward", str), (plain, "run", "first"), (plain, "run", "second")])
    assert layer("x") == "x"
    assert plain.run == "second"
    undo()
    assert "forward" not in vars(layer)
    assert plain.run == "own"
    plain.run = "later"
    undo()
    assert plain.run == "later"
