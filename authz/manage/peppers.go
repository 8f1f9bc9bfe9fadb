package manage

import (
	"context"
	"net/http"
	"strconv"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A Pepper is a version of the pepper as JSON.
type Pepper struct {
	Version uint32 `json:"version"`
	Left    int    `json:"left" doc:"Usable keys and tokens that only this version finds."`
}

// A RetiredPepper is the answer to the retirement of a pepper.
type RetiredPepper struct {
	Version uint32 `json:"version"`
}

type atPepper struct {
	Version string `path:"version"`
}

func (h *handler) listPeppers(ctx context.Context, c *call, _ *noInput) (*out[list[Pepper]], error) {
	all, err := h.svc.Peppers(ctx, c.Caller)
	if err != nil {
		return nil, err
	}
	return ok(listOf(all, func(p admin.PepperStatus) Pepper { return Pepper{p.Version, p.Left} })), nil
}

func (h *handler) retirePepper(ctx context.Context, c *call, in *atPepper) (*out[RetiredPepper], error) {
	version, err := strconv.ParseUint(in.Version, 10, 32)
	if err != nil {
		return nil, apikey.ErrNotFound
	}
	if err := h.svc.RetirePepper(ctx, c.Caller, uint32(version)); err != nil {
		return nil, err
	}
	return ok(RetiredPepper{uint32(version)}), nil
}

// Peppers lists the versions of the pepper.
func (c *Client) Peppers(ctx context.Context) ([]Pepper, error) {
	answer, err := send[list[Pepper]](ctx, c, http.MethodGet, "/peppers", nil, nil)
	return answer.Value, err
}

// RetirePepper retires an earlier pepper.
func (c *Client) RetirePepper(ctx context.Context, version uint32) error {
	_, err := send[RetiredPepper](ctx, c, http.MethodDelete, "/peppers/"+strconv.FormatUint(uint64(version), 10), nil, nil)
	return err
}
