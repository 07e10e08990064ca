// Judges the AsyncAPI document on stdin by AsyncAPI's own parser; one line for each thing it has to say.

import { readFileSync } from "node:fs";
import { Parser } from "@asyncapi/parser";

const { document, diagnostics } = await new Parser().parse(readFileSync(0, "utf8"));
for (const { severity, path, message } of diagnostics) console.log(severity, path.join("."), message);
process.exit(document && diagnostics.every(({ severity }) => severity > 1) ? 0 : 1);
