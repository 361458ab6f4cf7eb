// The list of routes: reads /openapi.json and shows it by dialect.

const REF = "#/components/schemas/";
const METHODS = ["get", "post", "put", "delete"];
const KEYS = { data: "key", admin: "admin key" };

/** Text in which `words` between backticks are set as code. */
function prose(text) {
  return (text || "").split("`").map((part, i) => (i % 2 ? make("code", { class: "mono" }, part) : part));
}

/** A schema in few words: its type, or the name of another schema. */
function typeOf(schema) {
  if (schema.$ref) return schema.$ref.replace(REF, "");
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" | ");
  if (schema.enum) return schema.enum.map((word) => JSON.stringify(word)).join(" | ");
  if (schema.type === "array") return schema.prefixItems ? `[${schema.prefixItems.map(typeOf).join(", ")}]` : `${typeOf(schema.items || {})}[]`;
  if (schema.type === "object" && schema.additionalProperties) return `{…: ${typeOf(schema.additionalProperties)}}`;
  return schema.format === "binary" ? "bytes" : schema.type || "any";
}

/** The names of all schemas that one speaks of. */
function namesIn(schema) {
  if (schema === null || typeof schema !== "object") return [];
  const own = typeof schema.$ref === "string" ? [schema.$ref.replace(REF, "")] : [];
  return own.concat(...Object.values(schema).map(namesIn));
}

function fieldTable(schema) {
  const rows = Object.entries(schema.properties || {}).map(([name, field]) => make("tr", {},
    make("td", { class: "mono" }, name),
    make("td", { class: "mono long" }, typeOf(field)),
    make("td", { class: "long" }, (schema.required || []).includes(name) ? "required" : JSON.stringify(field.default ?? null)),
    make("td", { class: "long dull" }, field.description || "")));
  const head = make("tr", {}, ...["key", "type", "default", ""].map((word) => make("th", {}, word)));
  return make("div", { class: "scroll" }, make("table", {}, head, ...rows));
}

/** A schema and those that it speaks of, each once. */
function schemaParts(first, schemas) {
  const names = [first];
  for (const name of names) for (const other of namesIn(schemas[name])) if (!names.includes(other)) names.push(other);
  return names.filter((name) => schemas[name].properties).flatMap((name) => [
    make("h2", {}, name), make("div", { class: "note" }, ...prose((schemas[name].description || "").trim())), fieldTable(schemas[name]),
  ]);
}

function bodyParts(operation, schemas) {
  if (!operation.requestBody) return [];
  return Object.entries(operation.requestBody.content).flatMap(([type, { schema }]) => [
    make("div", { class: "note" }, "body: ", make("code", { class: "mono" }, type)),
    ...(schema.$ref ? schemaParts(schema.$ref.replace(REF, ""), schemas) : []),
  ]);
}

function callOf(path, method, operation, schemas) {
  const key = operation.security.length ? KEYS[Object.keys(operation.security[0])[0]] : "open";
  const refused = operation["x-headrace-refused"] || [];
  const query = (operation.parameters || []).filter((each) => each.in === "query").map((each) => `\`${each.name}\``);
  const replyType = operation.responses["200"].content?.["application/json"].schema.$ref;
  const summary = make("summary", {},
    make("span", { class: "method mono" }, method.toUpperCase()),
    make("span", { class: "mono" }, path),
    make("span", { class: "pill dull" }, key),
    make("span", { class: "dull" }, ...prose(operation.summary)));
  const facts = [
    operation.description, `Answer: ${operation.responses["200"].description}.`,
    query.length ? `Query: ${query.join(", ")}.` : "",
    refused.length ? `Keys refused if they ask for something: ${refused.map((name) => `\`${name}\``).join(", ")}.` : "",
  ].filter(Boolean);
  const call = make("details", { class: "call" }, summary, ...facts.map((fact) => make("div", {}, ...prose(fact))));
  call.dataset.words = `${path} ${operation.summary} ${refused.join(" ")}`.toLowerCase();
  call.addEventListener("toggle", () => {
    if (call.open && !call.dataset.isFull) {
      call.dataset.isFull = "yes";
      call.append(...bodyParts(operation, schemas), ...(replyType ? schemaParts(replyType.replace(REF, ""), schemas) : []));
    }
  });
  return call;
}

function show(listing) {
  byId("about").textContent = `${listing.info.title} ${listing.info.version} · ${listing.info.description}`;
  const sections = listing.tags.map((tag) => {
    const calls = Object.entries(listing.paths).flatMap(([path, operations]) =>
      METHODS.filter((method) => operations[method]?.tags.includes(tag.name))
        .map((method) => callOf(path, method, operations[method], listing.components.schemas)));
    return make("section", { class: "full" }, make("h2", {}, tag.name), make("div", { class: "note" }, ...prose(tag.description)), ...calls);
  });
  byId("page").replaceChildren(...sections);
}

function find() {
  const words = byId("find").value.toLowerCase();
  for (const call of document.querySelectorAll("details.call")) call.hidden = !call.dataset.words.includes(words);
  for (const section of document.querySelectorAll("#page section")) {
    section.hidden = ![...section.querySelectorAll("details.call")].some((call) => !call.hidden);
  }
}

async function load() {
  try {
    show(await ask("openapi.json"));
    showKeyForm(false);
    find();
  } catch (error) {
    if (error instanceof NoKeyError) showKeyForm(true, error.message);
    else byId("about").textContent = `no answer (${error.message})`;
  }
}

watchKey(load);
byId("find").addEventListener("input", find);
load();
