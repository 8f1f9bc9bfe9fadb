package portal

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// alertPages registers the alerts of an instance.
func (p *portal) alertPages() {
	const at, section = "/instances/{instance}/alerts", "Alerts"
	p.page(section, "GET "+at, p.alerts)
	p.page(section, "POST "+at+"/{alert}/ack", p.ackAlert)
	p.page(section, "POST "+at+"/{alert}/disable", p.disableFromAlert)
}

const (
	alertPage    = 50 // alerts on a page
	alertsOfNone = 5  // before them, of those that belong to no instance
)

// An alertsView is a page of alerts.
type alertsView struct {
	Alerts       []alertRow
	All          bool // resolved ones too
	Kind         string
	Kinds        []choice
	Older, First string // addresses; "": there is none
}

// An alertRow is an alert with the key that it is about.
type alertRow struct {
	admin.AlertRecord
	Title string
	Key   *admin.KeyRecord // nil: of no key, or of one that is gone
}

// Ours reports whether the alert is of the instance whose page it is on, and not of none.
func (r *alertRow) Ours() bool { return r.InstanceID != "" }

// Open reports whether it is not over.
func (r *alertRow) Open() bool { return r.ResolvedAt.IsZero() }

// Acked reports whether somebody knows of it.
func (r *alertRow) Acked() bool { return !r.AckedAt.IsZero() }

var alertTitles = map[admin.AlertKind]string{
	admin.AlertNewNetwork: "New network", admin.AlertRefusals: "Many refusals", admin.AlertUnknownKeys: "Unknown keys",
	admin.AlertExpiring: "Expires soon", admin.AlertUnused: "Unused",
}

func (p *portal) alerts(w http.ResponseWriter, v *visit) error {
	if err := v.ParseForm(); err != nil {
		return errForm
	}
	data := alertsView{All: v.Form.Get("show") == "all", Kind: v.Form.Get("kind"), Kinds: []choice{{"", "any"}}}
	for _, kind := range []admin.AlertKind{admin.AlertNewNetwork, admin.AlertRefusals, admin.AlertUnknownKeys, admin.AlertExpiring, admin.AlertUnused} {
		data.Kinds = append(data.Kinds, choice{string(kind), alertTitles[kind]})
	}
	if _, known := alertTitles[admin.AlertKind(data.Kind)]; !known {
		data.Kind = ""
	}
	after, err := parseAlertPlace(v.Form.Get("after"))
	if err != nil {
		return apikey.ErrNotFound
	}
	query := admin.AlertQuery{Kind: admin.AlertKind(data.Kind), Open: !data.All, After: after, Limit: alertPage + 1}
	list, err := p.svc.Alerts(v.Context(), v.Caller, v.Instance, query)
	if err != nil {
		return err
	}
	var ofNone []*admin.Alert
	if after == (admin.AlertPlace{}) && v.Caller.InstanceID == "" {
		// They have no page of their own, so whoever may see them does with every instance, first. One is open at
		// most; of those that are over the last few will do.
		query.Limit = alertsOfNone
		if ofNone, err = p.svc.AlertsOfNone(v.Context(), v.Caller, query); err != nil {
			return err
		}
	}
	address := func(after string) string {
		values := url.Values{}
		for name, value := range map[string]string{"kind": data.Kind, "after": after} {
			if value != "" {
				values.Set(name, value)
			}
		}
		if data.All {
			values.Set("show", "all")
		}
		return v.Path("alerts") + "?" + values.Encode()
	}
	if len(list) > alertPage {
		list = list[:alertPage]
		last := list[alertPage-1]
		data.Older = address(fmt.Sprintf("%d.%s", last.OpenedAt.UnixMicro(), last.ID))
	}
	if after != (admin.AlertPlace{}) {
		data.First = address("")
	}
	for _, a := range append(ofNone, list...) {
		row := alertRow{AlertRecord: admin.AlertRecordOf(a), Title: alertTitles[a.Kind]}
		if !a.KeyID.IsZero() {
			k, err := p.svc.Key(v.Context(), v.Caller, v.Instance, a.KeyID)
			if err == nil {
				record := admin.RecordOf(k, time.Now())
				row.Key = &record
			} else if !errors.Is(err, apikey.ErrNotFound) {
				return err
			}
		}
		data.Alerts = append(data.Alerts, row)
	}
	return p.show(w, v, "alerts", "Alerts", data)
}

// parseAlertPlace reads what an address says of where a page begins.
func parseAlertPlace(s string) (admin.AlertPlace, error) {
	if s == "" {
		return admin.AlertPlace{}, nil
	}
	at, id, _ := strings.Cut(s, ".")
	micro, err := strconv.ParseInt(at, 10, 64)
	if err != nil {
		return admin.AlertPlace{}, err
	}
	last, err := apikey.ParseID(id)
	return admin.AlertPlace{OpenedAt: time.UnixMicro(micro).UTC(), ID: last}, err
}

func (p *portal) ackAlert(w http.ResponseWriter, v *visit) error {
	id, err := apikey.ParseID(v.PathValue("alert"))
	if err != nil {
		return apikey.ErrNotFound
	}
	of := v.Instance
	if v.PostFormValue("of") == "none" {
		of = ""
	}
	a, err := p.svc.AckAlert(v.Context(), v.Caller, of, id)
	if err != nil {
		return err
	}
	said := "Noted that you know of it. It stays open until what it tells of is over."
	if !a.ResolvedAt.IsZero() {
		said = "Noted that you know of it, and with that it is over."
	}
	return p.done(w, v, v.Path("alerts"), said)
}

// disableFromAlert disables the key that an alert is about, and notes that the alert is known.
func (p *portal) disableFromAlert(w http.ResponseWriter, v *visit) error {
	id, err := apikey.ParseID(v.PathValue("alert"))
	if err != nil {
		return apikey.ErrNotFound
	}
	a, err := p.svc.Alert(v.Context(), v.Caller, v.Instance, id)
	if err != nil {
		return err
	}
	if a.KeyID.IsZero() {
		return apikey.ErrNotFound
	}
	changed, err := p.svc.UpdateKey(v.Context(), v.Caller, v.Instance, a.KeyID, admin.KeyPatch{Disabled: admin.To(true)}, 0)
	if err != nil {
		return err
	}
	if _, err := p.svc.AckAlert(v.Context(), v.Caller, v.Instance, id); err != nil {
		return err
	}
	return p.done(w, v, v.Path("keys", a.KeyID.String()), "Disabled: requests with it are refused until it is enabled."+everywhere(changed.Propagation))
}
