"""What LODO keeps between steps. `layout` says what and how it lies in `optimizer.state`, `group_state` has the live
state of a param group, `checks` refuses saved states that do not fit."""
