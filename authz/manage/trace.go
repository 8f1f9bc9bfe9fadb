package manage

import (
	"net/http"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// trace begins the span of a request, and returns what ends it. The span tells the route, the status and the
// request's id, and no more: otelhttp would write down path, query and User-Agent, in which somebody may have
// put a secret.
func (h *handler) trace(r *http.Request, id string) (*http.Request, func(*answer)) {
	ctx := propagation.TraceContext{}.Extract(r.Context(), propagation.HeaderCarrier(r.Header))
	ctx, span := h.cfg.Tracer.Start(ctx, "no route", trace.WithSpanKind(trace.SpanKindServer),
		trace.WithAttributes(attribute.String("keyward.request_id", id)))
	return r.WithContext(ctx), func(a *answer) {
		status := a.status
		if status == 0 {
			status = http.StatusOK
		}
		span.SetAttributes(attribute.Int("http.response.status_code", status))
		if status >= http.StatusInternalServerError {
			span.SetStatus(codes.Error, http.StatusText(status))
		}
		span.End()
	}
}
