// Bundles every example, as its user's bundler would: node bundle.mjs EXAMPLES OUT. Packages are found in node_modules
// beside this file; React 18's in react-18/node_modules. React is in its development mode, which complains.

import { build } from "esbuild";
import { readdirSync, writeFileSync } from "node:fs";
import { basename, extname, join } from "node:path";

const [, , examples, out] = process.argv;
const here = import.meta.dirname;
const older = { react: join(here, "react-18/node_modules/react"), "react-dom": join(here, "react-18/node_modules/react-dom") };

/** Each example exports a React component or a function that mounts it. */
const entry = (file) =>
  extname(file) === ".jsx"
    ? `import { StrictMode } from "react";
       import { createRoot } from "react-dom/client";
       import { Chat } from ${JSON.stringify(file)};
       const root = createRoot(document.getElementById("root"));
       root.render(<StrictMode><Chat /></StrictMode>);
       window.leave = () => root.unmount();`
    : `import { mount } from ${JSON.stringify(file)};
       mount(document.getElementById("root"));`;

const virtual = {
  name: "entries",
  setup({ onResolve, onLoad }) {
    onResolve({ filter: /^entry:/ }, ({ path }) => ({ path: path.slice("entry:".length), namespace: "entry" }));
    onLoad({ filter: /./, namespace: "entry" }, ({ path }) => ({ contents: entry(path), loader: "jsx", resolveDir: here }));
  },
};

const nameOf = (file) => basename(file, extname(file));

const bundle = (files, alias, suffix = "") =>
  build({
    entryPoints: files.map((file) => ({ in: `entry:${file}`, out: nameOf(file) + suffix })),
    outdir: out,
    bundle: true,
    minify: true,
    format: "esm",
    jsx: "automatic",
    define: { "process.env.NODE_ENV": '"development"' },
    nodePaths: [join(here, "node_modules")],
    logLevel: "error",
    alias: { ...alias, chat: join(examples, "../chat") },
    plugins: [virtual],
  });

const probe = join(here, "probe.jsx");
const files = [...readdirSync(examples).filter(extname).map((name) => join(examples, name)), probe];
const both = [join(examples, "hook.jsx"), probe];
await Promise.all([bundle(files, {}), bundle(both, older, "-18")]);
for (const name of [...files.map(nameOf), ...both.map((file) => `${nameOf(file)}-18`)]) {
  const page = `<!doctype html><meta charset="utf-8"><title>${name}</title><link rel="icon" href="data:,">`;
  writeFileSync(join(out, `${name}.html`), `${page}<div id="root"></div><script type="module" src="${name}.js"></script>`);
}
