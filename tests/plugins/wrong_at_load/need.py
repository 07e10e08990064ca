need = {"voice"}
