"""How a job asks models: answers that are kept, their bill, one meter, a local engine."""
