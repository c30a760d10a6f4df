"""Tables, figures and pages made from recorded rows."""
