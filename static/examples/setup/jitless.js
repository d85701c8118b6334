// A file of its own, because it has to run before the modules that make schemas when they are loaded.

import { config } from "zod";

config({ jitless: true });
