needs = {"coffee"}
