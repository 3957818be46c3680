"""By which mechanism a model knows position: interventions, the evidence they give, and the verdicts."""
