package portal

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// A keyFormView is the page to make a key, or to change one.
type keyFormView struct {
	keyForm

	Faults   fieldFaults
	Key      *admin.KeyRecord // nil: a new one
	Once     string
	Revision string
	Own      bool // the caller makes keys of its own only, and has no say in their limits
	Policy   apikey.Policy
	Inherits []inherited
	Conflict []difference // what is now, and what was typed, where somebody changed the key meanwhile
	Conflicts,
	SeesPolicy bool
	Today, Last string // dates between which a key may expire
}

// An inherited is what a type of key has where it says nothing.
type inherited struct {
	Type, Rate, Burst, MaxConcurrent string
}

// A difference is a field that two people see differently.
type difference struct{ Field, Now, Typed string }

// formView fills in what the form shows besides what is typed.
func (p *portal) formView(v *visit, f keyForm) (keyFormView, error) {
	data := keyFormView{keyForm: f, Faults: fieldFaults{}, Own: v.Caller.Role == admin.RoleUser, Once: uuid.NewString()}
	var policy apikey.Policy
	if v.Can("instance.read") {
		in, err := p.svc.Instance(v.Context(), v.Caller, v.Instance)
		if err != nil {
			return data, err
		}
		policy, data.SeesPolicy = in.Policy, true
	}
	data.Policy = policy.InForce()
	for _, t := range []apikey.Type{apikey.TypeInstance, apikey.TypeAgent, apikey.TypeUser} {
		l := policy.LimitsOf(&apikey.Key{Type: t})
		data.Inherits = append(data.Inherits, inherited{string(t), rateText(l.Rate), countText(l.Burst), countText(l.MaxConcurrent)})
	}
	now := time.Now().UTC()
	data.Today, data.Last = now.Format(time.DateOnly), now.Add(data.Policy.Expiration.LongestLife.Std()).Format(time.DateOnly)
	return data, nil
}

func rateText(r apikey.Rate) string {
	if r.Requests <= 0 {
		return "unlimited"
	}
	return fmt.Sprintf("%d per %s", r.Requests, r.Per)
}

func countText(n int) string {
	if n == apikey.Unlimited {
		return "unlimited"
	}
	return strconv.Itoa(n)
}

func (p *portal) newKey(w http.ResponseWriter, v *visit) error {
	if !v.Can("key.create") {
		return &admin.ForbiddenError{Reason: "the role " + string(v.Caller.Role) + " has no right to create keys"}
	}
	data, err := p.formView(v, keyForm{Type: string(apikey.TypeInstance), ScopesMode: "all"})
	if err != nil {
		return err
	}
	if data.Own {
		data.Type = string(apikey.TypeUser)
	}
	e := data.Policy.Expiration
	if data.ExpirationPolicy = string(e.Default); e.Required && e.Default == apikey.ExpiresNever {
		data.ExpirationPolicy = string(apikey.ExpiresByTime)
	}
	data.ExpirationDate = time.Now().UTC().Add(e.Life.Std()).Format(time.DateOnly)
	data.InactivityDays = strconv.Itoa(e.InactivityDays)
	return p.show(w, v, "keyform", "Create key", data)
}

func (p *portal) createKey(w http.ResponseWriter, v *visit) error {
	f := keyFormOf(v.PostForm)
	caller, err := callerOnce(v)
	if err != nil {
		return err
	}
	in, bad := f.key()
	if v.Caller.Role == admin.RoleUser {
		in.Type, in.UserPrincipalName = "", "" // its own
	}
	if len(bad) == 0 || !v.Can("key.create") {
		made, err := p.svc.CreateKey(v.Context(), caller, v.Instance, in)
		if err == nil {
			return p.showSecret(w, v, "Key created", made)
		}
		if err := addTo(bad, err); err != nil {
			return p.again(w, v, f, err)
		}
	}
	return p.againWith(w, v, f, bad, nil)
}

// callerOnce is who asks, for what makes a secret.
func callerOnce(v *visit) (admin.Caller, error) {
	o, err := once(v)
	caller := v.Caller
	caller.Once = o
	return caller, err
}

// again shows the form anew where the reason is none of its fields, and may be gone in a while: what was typed must
// not be lost for that. Anything else is a page of its own.
func (p *portal) again(w http.ResponseWriter, v *visit, f keyForm, err error) error {
	f2 := failureOf(err)
	if f2.Status != http.StatusTooManyRequests && f2.code != "QuotaExceeded" && f2.Status != http.StatusServiceUnavailable {
		return err
	}
	p.refused(v.Context(), v, "", f2.code)
	f2.sayWhen(w)
	return p.againWith(w, v, f, fieldFaults{"": strings.TrimSpace(f2.Text + " " + f2.Next)}, f2)
}

func (p *portal) againWith(w http.ResponseWriter, v *visit, f keyForm, bad fieldFaults, because *failure) error {
	data, err := p.formView(v, f)
	if err != nil {
		return err
	}
	data.Faults = bad
	status := http.StatusBadRequest
	if because != nil {
		status = because.Status
	}
	return p.showAs(w, v, status, "keyform", "Create key", data)
}

// A secretView is the one page that shows a secret.
type secretView struct {
	Key         admin.KeyRecord
	Secret      string
	File        string // name to save it under
	Propagation admin.Propagation
	Old         *admin.GenerationRecord // the secret before, where it goes on for a while
}

// showSecret answers with a secret, here and nowhere else.
func (p *portal) showSecret(w http.ResponseWriter, v *visit, title string, made admin.CreatedKey) error {
	data := secretView{Key: admin.RecordOf(made.Key, time.Now()), Secret: made.Secret.Reveal(), Propagation: made.Propagation}
	data.File = fileName(data.Key.Name)
	for i := range data.Key.Generations {
		if g := &data.Key.Generations[i]; g.ValidUntil.After(time.Now()) {
			data.Old = g
		}
	}
	// Whatever keeps pages beside the browser's cache.
	w.Header().Set("Cache-Control", "no-store, max-age=0")
	w.Header().Set("Pragma", "no-cache")
	return p.show(w, v, "secret", title, data)
}

// fileName is what a secret is saved as: the key's name in letters that any file system takes.
func fileName(name string) string {
	clean := strings.Map(func(r rune) rune {
		switch {
		case r >= '0' && r <= '9', r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r == '.', r == '_', r == '-':
			return r
		}
		return '-'
	}, name)
	if clean = strings.Trim(clean, ".-"); clean == "" {
		clean = "keyward"
	}
	return clean + "-key.txt"
}

// keyOf returns the key that the address names.
func (p *portal) keyOf(v *visit) (*apikey.Key, error) {
	id, err := apikey.ParseID(v.PathValue("key"))
	if err != nil {
		return nil, apikey.ErrNotFound
	}
	return p.svc.Key(v.Context(), v.Caller, v.Instance, id)
}

func (p *portal) editKey(w http.ResponseWriter, v *visit) error {
	k, err := p.keyOf(v)
	if err != nil {
		return err
	}
	if !v.Can("key.update") {
		return &admin.ForbiddenError{Reason: "the role " + string(v.Caller.Role) + " has no right to change keys"}
	}
	r := admin.RecordOf(k, time.Now())
	return p.showEdit(w, v, http.StatusOK, k, keyFormFrom(&r), fieldFaults{}, nil)
}

func (p *portal) showEdit(w http.ResponseWriter, v *visit, status int, k *apikey.Key, f keyForm, bad fieldFaults, conflict []difference) error {
	data, err := p.formView(v, f)
	if err != nil {
		return err
	}
	r := admin.RecordOf(k, time.Now())
	data.Key, data.Revision, data.Faults = &r, strconv.FormatUint(uint64(k.Revision), 10), bad
	data.Conflict, data.Conflicts = conflict, status == http.StatusPreconditionFailed
	return p.showAs(w, v, status, "keyform", "Edit "+r.Name, data)
}

func (p *portal) updateKey(w http.ResponseWriter, v *visit) error {
	k, err := p.keyOf(v)
	if err != nil {
		return err
	}
	seen, err := strconv.ParseUint(v.PostForm.Get("revision"), 10, 63)
	if err != nil || seen == 0 {
		return errForm
	}
	record := admin.RecordOf(k, time.Now())
	f, was := keyFormOf(v.PostForm), keyFormFrom(&record)
	// What cannot be changed, and what the form does not show, is as it is.
	f.Type, f.AgentName, f.UserPrincipalName, f.Environment = was.Type, was.AgentName, was.UserPrincipalName, was.Environment
	if v.Caller.Role == admin.RoleUser {
		f.RateRequests, f.RatePer, f.Burst, f.MaxConcurrent = was.RateRequests, was.RatePer, was.Burst, was.MaxConcurrent
	}
	if f.ScopesMode != "these" {
		f.Scopes = was.Scopes
	}
	patch, bad := f.patch(&was)
	if len(bad) > 0 {
		return p.showEdit(w, v, http.StatusBadRequest, k, f, bad, nil)
	}
	changed, err := p.svc.UpdateKey(v.Context(), v.Caller, v.Instance, k.ID, patch, apikey.Revision(seen))
	if errors.Is(err, admin.ErrPrecondition) {
		if k, err = p.keyOf(v); err != nil {
			return err
		}
		record = admin.RecordOf(k, time.Now())
		was = keyFormFrom(&record)
		return p.showEdit(w, v, http.StatusPreconditionFailed, k, f, bad, differences(&was, &f))
	}
	if err != nil {
		if err := addTo(bad, err); err != nil {
			return err
		}
		return p.showEdit(w, v, http.StatusBadRequest, k, f, bad, nil)
	}
	return p.done(w, v, v.Path("keys", k.ID.String()), "Changed."+everywhere(changed.Propagation))
}

// differences lists the fields in which what is now differs from what was typed.
func differences(now, typed *keyForm) []difference {
	var list []difference
	for _, d := range []difference{
		{"Name", now.Name, typed.Name}, {"Description", now.Description, typed.Description},
		{"Scopes", now.scopesText(), typed.scopesText()}, {"Allowed addresses", now.AllowedIPs, typed.AllowedIPs},
		{"Rate", now.RateRequests + " per " + now.RatePer, typed.RateRequests + " per " + typed.RatePer},
		{"Burst", now.Burst, typed.Burst}, {"At once", now.MaxConcurrent, typed.MaxConcurrent},
		{"Expiration", now.ExpirationPolicy, typed.ExpirationPolicy}, {"Expiration date", now.ExpirationDate, typed.ExpirationDate},
		{"Days without use", now.InactivityDays, typed.InactivityDays}, {"Metadata", now.Metadata, typed.Metadata},
	} {
		if d.Now != d.Typed {
			list = append(list, d)
		}
	}
	return list
}

func (f *keyForm) scopesText() string {
	if f.ScopesMode != "these" {
		return f.ScopesMode
	}
	return strings.Join(lines(f.Scopes), " ")
}

// everywhere says how far a change has come.
func everywhere(p admin.Propagation) string {
	if p.Everywhere {
		return ""
	}
	if p.EffectiveEverywhereAt.IsZero() {
		return " It is not known yet whether every replica has heard of it."
	}
	return " It holds everywhere from " + p.EffectiveEverywhereAt.UTC().Format("15:04:05") + " UTC."
}

func (p *portal) switchKey(disabled bool) pageFunc {
	return func(w http.ResponseWriter, v *visit) error {
		k, err := p.keyOf(v)
		if err != nil {
			return err
		}
		changed, err := p.svc.UpdateKey(v.Context(), v.Caller, v.Instance, k.ID, admin.KeyPatch{Disabled: admin.To(disabled)}, 0)
		if err != nil {
			return err
		}
		said := "Enabled: it works again."
		if disabled {
			said = "Disabled: requests with it are refused until it is enabled."
		}
		return p.done(w, v, v.Path("keys", k.ID.String()), said+everywhere(changed.Propagation))
	}
}

// A rotateView is the page before a key gets another secret.
type rotateView struct {
	Key    admin.KeyRecord
	Once   string
	Grace  string
	Two    bool // two secrets are valid already
	Graces []choice
	Fault  string
}

var graces = []choice{
	{"24h", "24 hours"}, {"0s", "Not at all: it ends now"}, {"1h", "1 hour"}, {"7d", "7 days"}, {"30d", "30 days"},
}

func (p *portal) askToRotate(w http.ResponseWriter, v *visit) error {
	k, err := p.keyOf(v)
	if err != nil {
		return err
	}
	if !v.Can("key.rotate") {
		return &admin.ForbiddenError{Reason: "the role " + string(v.Caller.Role) + " has no right to rotate keys"}
	}
	return p.showRotate(w, v, http.StatusOK, k, graces[0].Value, "")
}

func (p *portal) showRotate(w http.ResponseWriter, v *visit, status int, k *apikey.Key, grace, fault string) error {
	now := time.Now()
	data := rotateView{Key: admin.RecordOf(k, now), Once: uuid.NewString(), Grace: grace, Graces: graces, Fault: fault}
	valid := 0
	for i := range k.Generations {
		if !k.Generations[i].EndedAt(now) {
			valid++
		}
	}
	data.Two = valid >= admin.MaxValid
	return p.showAs(w, v, status, "rotate", "Rotate "+k.Name, data)
}

func (p *portal) rotateKey(w http.ResponseWriter, v *visit) error {
	k, err := p.keyOf(v)
	if err != nil {
		return err
	}
	caller, err := callerOnce(v)
	if err != nil {
		return err
	}
	in := admin.RotateInput{GracePeriod: v.PostForm.Get("gracePeriod"), EndOldest: v.PostForm.Get("endOldest") == "true"}
	made, err := p.svc.RotateKey(v.Context(), caller, v.Instance, k.ID, in, 0)
	if err == nil {
		return p.showSecret(w, v, "New secret", made)
	}
	if fields, rest := faultsOf(err); len(fields) > 0 && len(rest) == 0 {
		reasons := []string{}
		for field, reason := range fields {
			reasons = append(reasons, field+" "+reason)
		}
		slices.Sort(reasons)
		return p.showRotate(w, v, http.StatusBadRequest, k, in.GracePeriod, strings.Join(reasons, "; "))
	}
	if state, ok := errors.AsType[*admin.StateError](err); ok && k.RevokedAt.IsZero() {
		return p.showRotate(w, v, http.StatusConflict, k, in.GracePeriod, state.Error())
	}
	return err
}

// A revokeView is the page before a key ends for good.
type revokeView struct {
	Key     admin.KeyRecord
	Advice  admin.Advice
	Reasons []choice
}

var reasonTexts = map[apikey.RevocationReason]string{
	apikey.RevokedKeyCompromise: "Others know the secret, or may", apikey.RevokedSuperseded: "Another key has taken its place",
	apikey.RevokedOwnerLeft: "Its owner has left", apikey.RevokedUnused: "Nobody uses it", apikey.RevokedOther: "Another reason",
}

func (p *portal) askToRevoke(w http.ResponseWriter, v *visit) error {
	k, err := p.keyOf(v)
	if err != nil {
		return err
	}
	if !v.Can("key.revoke") {
		return &admin.ForbiddenError{Reason: "the role " + string(v.Caller.Role) + " has no right to revoke keys"}
	}
	now := time.Now()
	data := revokeView{Key: admin.RecordOf(k, now), Advice: admin.AdviceOn(k, now), Reasons: []choice{{"", "None given"}}}
	for _, reason := range apikey.RevocationReasons() {
		data.Reasons = append(data.Reasons, choice{string(reason), reasonTexts[reason]})
	}
	return p.show(w, v, "revoke", "Revoke "+k.Name, data)
}

func (p *portal) revokeKey(w http.ResponseWriter, v *visit) error {
	k, err := p.keyOf(v)
	if err != nil {
		return err
	}
	done, err := p.svc.RevokeKey(v.Context(), v.Caller, v.Instance, k.ID, apikey.RevocationReason(v.PostForm.Get("reason")))
	if err != nil {
		return err
	}
	return p.done(w, v, v.Path("keys", k.ID.String()), "Revoked: requests with it are refused, for good."+everywhere(done.Propagation))
}

func (p *portal) endGeneration(w http.ResponseWriter, v *visit) error {
	k, err := p.keyOf(v)
	if err != nil {
		return err
	}
	n, _ := strconv.ParseUint(v.PathValue("number"), 10, 31) // what is no number is one that nothing has
	done, err := p.svc.RevokeGeneration(v.Context(), v.Caller, v.Instance, k.ID, int(n))
	if err != nil {
		return err
	}
	return p.done(w, v, v.Path("keys", k.ID.String()), fmt.Sprintf("Secret %d is over.", n)+everywhere(done.Propagation))
}
