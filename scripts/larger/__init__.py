"""The study on a LLaVA of real pretrained parts, which packages carry: fetched, built and trained by run.sh."""
