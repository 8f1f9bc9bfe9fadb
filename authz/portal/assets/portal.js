// What the portal's pages do where scripts run. Every page works without.
"use strict";
