// Swagger UI for the schema of this service, wherever a proxy has put it.

import * as key from "./key.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
const setScheme = () => document.documentElement.classList.toggle("dark-mode", dark.matches); // Swagger UI's own class
dark.addEventListener("change", setScheme);
setScheme();

const schema = await (await fetch("openapi.json")).json();
document.title = schema.info.title;
window.SwaggerUIBundle({
  // Requests go to where this page is from, below whatever path that is.
  spec: { ...schema, servers: [{ url: new URL(".", document.baseURI).href.replace(/\/$/, "") }] },
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null, // it would send the schema elsewhere
  requestInterceptor: (request) => {
    Object.assign(request.headers, key.headers()); // the key that the other pages have asked for
    return request;
  },
});
