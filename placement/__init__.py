"""Pure decisions: costs and planners. Values in, plans out."""
